"""Write files atomically: completely or not at all.

Every file that the package leaves behind (checkpoints, reports, masks, measurements) is written
under a temporary name in the folder of the target, synced to disk and renamed over the target::

    .3f0c5a.partial   write ... fsync      the target is unchanged until here
    last.ckpt         <- os.replace        the old file or the new one, never a part
    folder            fsync                the rename survives a power failure

A rename is atomic only within a file system, so the temporary file is in the same folder. It is
created exclusively, so a symbolic link planted under its name is not followed.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segformer_pl.errors import UserError

PARTIAL_SUFFIX = ".partial"
# The disk is full, the user's quota is used up, or the file is larger than the limit.
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A folder has the file's name, a file has the folder's name, or the name is invalid.
NAME_ERRORS = (
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.EINVAL,
)


class WriteError(OSError, UserError):
    """Raised when a file cannot be written; an existing file of that name is unchanged.

    It is an ``OSError`` too, for callers that continue when one of several files fails. ``errno``
    is that of the cause, if it has one.
    """

    @property
    def is_name_error(self) -> bool:
        """Whether only the name of this file is at fault, so that other files can be written."""
        return self.errno in NAME_ERRORS


@contextmanager
def atomic_write(file: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing in binary mode; it replaces the target when the block ends.

    If the block raises, the temporary file is removed and the target stays as it was. Missing
    parent folders are created.

    Args:
        file: Path of the target.

    Raises:
        WriteError: The file cannot be written, for example because the disk is full or the folder
            is read-only.
    """
    file = Path(file)
    partial = file.parent / f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # Mode 0o666 minus the umask, as open() does; tempfile would use 0o600.
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
    """Write a text file in UTF-8 atomically, see :func:`atomic_write`."""
    with atomic_write(file) as stream:
        stream.write(text.encode())


@contextmanager
def keep_previous(file: str | Path, num: int) -> Iterator[None]:
    """Keep what a file held before the block, which replaces it, under another name.

    The content before the block becomes ``FILE.1``, that of ``FILE.1`` becomes ``FILE.2``, and so
    on. ``FILE`` itself never goes missing. If the block raises, nothing is renamed.

    Args:
        file: Path of the file, which need not exist.
        num: Number of earlier contents to keep.

    Raises:
        WriteError: The file cannot be kept, for example because the disk is full.
    """
    file = Path(file)
    held = file.parent / f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        if num and file.exists():
            _link_or_copy(file, held)
        yield
        if held.exists():
            for number in range(num, 1, -1):
                with suppress(FileNotFoundError):
                    os.replace(previous(file, number - 1), previous(file, number))
            os.replace(held, previous(file, 1))
            _sync_folder(file.parent)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise _write_error(file, error) from error
    finally:
        with suppress(OSError):
            held.unlink()


def previous(file: str | Path, number: int = 1) -> Path:
    """Return the path under which :func:`keep_previous` keeps an earlier content of a file.

    Args:
        file: Path of the file.
        number: 1 for the content before the present one, 2 for that before it, and so on.
    """
    return Path(f"{file}.{number}")


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(file, target)


def remove_partial_files(folder: str | Path) -> None:
    """Remove temporary files that killed processes left in a folder.

    Call this only for a folder with a single writer, such as the checkpoints of a run: it would
    also remove a file that another process is writing.
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
    write_error = WriteError(
        f"cannot write {str(file)!r}: {_reason(file, error)}; {advice(error.errno)}"
    )
    write_error.errno = error.errno
    return write_error


def advice(code: int | None) -> str:
    """Return what to do about an error when writing a file or folder, for its message.

    Args:
        code: ``errno`` of the error.
    """
    if code in FULL_ERRORS:
        return "free space or give a folder that can be written"
    if code == errno.ENAMETOOLONG:
        return "give a shorter name"
    return "give a folder that can be written"


def make_writable_folder(folder: str | Path, option: str = "") -> None:
    """Create a folder if needed and check that files can be written to it.

    Commands call this before they start, so that hours of work do not end in an error.

    Args:
        folder: Path of the folder.
        option: Option that the path comes from, for the message.

    Raises:
        WriteError: The folder cannot be created, is a file, or is not writable.
    """
    probe = Path(folder) / f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise WriteError(
            f"{option}{': ' if option else ''}cannot write to the folder {str(folder)!r}: "
            f"{_reason(probe, error)}; {advice(error.errno)}"
        ) from error


def _reason(file: Path, error: OSError) -> str:
    """Return why a file cannot be written, which may be another file in place of a folder."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        for folder in file.parents:
            if folder.is_file():
                return f"{str(folder)!r} is a file"
    return error.strerror or str(error)
