"""Write a file completely or not at all.

Every file that the package leaves behind (checkpoints, reports, masks, measurements) is written
under a temporary name in the target's own folder, synced to the disk and renamed over the target:

    .3f0c5a.partial   write ... fsync      target untouched until here
    last.ckpt         <- os.replace        old file or new file, never a part of one
    folder            fsync                the rename survives a power failure

A rename is atomic only within one file system, so the temporary file never lies elsewhere. It is
created exclusively, so a link planted under its name is not followed.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segformer_pl.errors import UserError

PARTIAL_SUFFIX = ".partial"
# No room: on the disk, for this user, or for a file as large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A folder has the name of the file, a file that of its folder, or the name is none here.
OF_THE_NAME = (
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.EINVAL,
)


class WriteError(OSError, UserError):
    """A file could not be written; the message is one sentence, and the old file is intact.

    It is an ``OSError`` too, for callers that go on when one of several files cannot be written.
    ``errno`` is that of the cause, if it had one.
    """

    @property
    def is_of_the_name(self) -> bool:
        """Whether the cause is the name of this one file, so that others can be written."""
        return self.errno in OF_THE_NAME


@contextmanager
def atomic_write(file: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing in binary mode; it appears under its name when the block ends.

    If the block raises, the temporary file is removed and what stood under the name before stays.
    Missing parent folders are created.

    Raises:
        WriteError: The disk is full, the folder is read-only, or the like.
    """
    file = Path(file)
    partial = file.parent / f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # 0o666 less the umask, as open() does; the tempfile module would hide it from the group.
        stream = os.fdopen(os.open(partial, flags, 0o666), "w+b")
    except OSError as error:
        raise _write_error(file, error) from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        _sync_folder(file.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            raise _write_error(file, error) from error
        raise


def atomic_write_text(file: str | Path, text: str) -> None:
    """Write a text file in UTF-8, see :func:`atomic_write`."""
    with atomic_write(file) as stream:
        stream.write(text.encode())


def remove_partial_files(folder: str | Path) -> None:
    """Remove the temporary files of writers that were killed.

    Only for a folder that has a single writer, such as the checkpoints of a run: another
    writer's file would be removed under its hands.
    """
    for partial in Path(folder).glob(f".*{PARTIAL_SUFFIX}"):
        with suppress(OSError):
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_error(file: Path, error: OSError) -> WriteError:
    written = WriteError(
        f"cannot write {str(file)!r}: {error.strerror or error}; {advice(error.errno)}"
    )
    written.errno = error.errno
    return written


def advice(code: int | None) -> str:
    """What helps against an error of this number when a file or folder is written."""
    if code in FULL:
        return "free space or give a folder that can be written"
    if code == errno.ENAMETOOLONG:
        return "give a shorter name"
    return "give a folder that can be written"


def make_writable_folder(folder: str | Path, option: str = "") -> None:
    """Make a folder and write a file to it, so that hours of work do not end in an error.

    Args:
        folder: The folder.
        option: The argument that it was given by, for the message.

    Raises:
        WriteError: The folder cannot be made, is a file, or cannot be written to.
    """
    probe = Path(folder) / f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise WriteError(
            f"{option}{': ' if option else ''}cannot write to the folder {str(folder)!r}: "
            f"{error.strerror or error}; {advice(error.errno)}"
        ) from error
