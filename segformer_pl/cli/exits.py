"""Error messages and exit statuses of commands that fail or are interrupted."""

import errno
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segformer_pl.atomic import WriteError
from segformer_pl.cli.foreign_errors import explain_foreign
from segformer_pl.errors import INTERRUPTED, Interrupted, LostRank, find_user_error
from segformer_pl.worker_errors import explain_worker_failure

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# The access rights, a damaged disk, a file server that is gone
ACCESS_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
PACKAGE = Path(__file__).parents[1]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of this package as ``warning: ...``, without the line of code that warns."""
    format_warning = warnings.formatwarning

    def format_plainly(
        message: Any, category: Any, filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(PACKAGE):
            return f"warning: {message}\n"
        return format_warning(message, category, filename, lineno, line)

    warnings.formatwarning = format_plainly
    try:
        yield
    finally:
        warnings.formatwarning = format_warning


@contextmanager
def exits() -> Iterator[None]:
    """Turn errors of the user, and signals, into a message and an exit status.

    =========================  =======================================  =====================
    exception                  message                                  exit status
    =========================  =======================================  =====================
    a user's error             ``error: ...``, one sentence             1
    a failed data loader       the same                                 1
    another rank has failed    the same, once per machine               1
    SIGTERM, Ctrl-C, SIGUSR1   how to resume, if that is possible       128 + signal number
    any other                  the traceback, as it is a bug            1
    =========================  =======================================  =====================
    """
    try:
        yield
    except Interrupted as interrupted:
        sys.stderr.write(f"{interrupted.message}\n" if interrupted.message else "")
        if interrupted.job is not None:
            from segformer_pl.callbacks.signals import requeue

            sys.stderr.write(f"requeuing Slurm's job {interrupted.job}\n")
            sys.stderr.flush()  # Slurm ends this process
            if (reason := requeue(interrupted.job)) is not None:
                sys.stderr.write(f"job {interrupted.job} is not requeued: {reason}\n")
        sys.exit(interrupted.code)
    except KeyboardInterrupt:
        sys.stderr.write("Ctrl-C: stopped\n")
        sys.exit(INTERRUPTED)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning exits with status 1
            sys.exit(INTERRUPTED)
        raise
    except Exception as error:
        sentence = explain(error)
        lost = find_user_error(error)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            if not isinstance(lost, LostRank):
                from segformer_pl.callbacks.watchdog import record_for_torchrun

                record_for_torchrun(error)
            # Its closing table shows the rank that failed first, by whole seconds. So a rank that
            # ends because of another one must not end in the same second.
            time.sleep(1)
        if isinstance(lost, LostRank) and lost.is_printed:
            sys.exit(1)
        if sentence is None:
            raise
        sys.exit("; ".join([f"error: {sentence}", *getattr(error, "__notes__", [])]))


def explain(error: Exception) -> str | None:
    """Return the message for an error of the user; None for a bug of the program."""
    if (user_error := find_user_error(error)) is not None:
        return str(user_error)
    if isinstance(error, OSError) and (sentence := _explain_file(error)) is not None:
        return sentence
    if (sentence := explain_worker_failure(error)) is not None:
        return sentence
    return explain_foreign(error)


def _explain_file(error: OSError) -> str | None:
    # On a full disk, a second write (such as a logger's) fails while the error of the first is
    # handled. So search the chain of exceptions for the first one.
    first: BaseException | None = error
    while first is not None and not isinstance(first, WriteError):
        first = first.__context__
    if first is not None:
        return str(first)
    if error.errno in DISK_ERRORS:
        return f"cannot write {error.filename or 'a file'!r}: {error.strerror}"
    if error.errno in ACCESS_ERRORS and error.filename is not None:
        return (
            f"cannot access {str(error.filename)!r}: {error.strerror}; check its access rights, "
            "those of the folders above it, and the disk"
        )
    return None
