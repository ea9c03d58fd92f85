"""What a user reads and what the shell gets when a command does not come to its end."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from segformer_pl.atomic import WriteError
from segformer_pl.callbacks import Interrupted
from segformer_pl.errors import find_user_error
from segformer_pl.lightning_workarounds import came_from_restoring

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def exits() -> Iterator[None]:
    """Turn what the user can mend, and signals, into a sentence and an exit status.

    Status 1 and ``error: ...`` for a mistake of the user's, 128 and the number of the signal for an
    interruption. Any other exception is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except Interrupted as interrupted:
        sys.stderr.write(f"{interrupted.message}\n" if interrupted.message else "")
        sys.exit(interrupted.code)
    except KeyboardInterrupt:
        sys.stderr.write("Ctrl-C: stopped\n")
        sys.exit(130)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's own exit, with status 1
            sys.exit(130)
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit("; ".join([f"error: {sentence}", *getattr(error, "__notes__", [])]))


def explain(error: Exception) -> str | None:
    """Say in one sentence what the user can mend; None if it is a fault of the program."""
    if (user_error := find_user_error(error)) is not None:
        return str(user_error)
    if isinstance(error, MisconfigurationException):  # Lightning's word for such a mistake
        return str(error)
    if isinstance(error, OSError) and (sentence := _explain_failed_write(error)) is not None:
        return sentence
    if came_from_restoring(error):
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return (
            f"ckpt_path: the checkpoint cannot be restored ({reason[:200]}); give another, or "
            "start a new run from its weights with --model.weights"
        )
    return None


def _explain_failed_write(error: OSError) -> str | None:
    # On a full disk a second write, such as a logger's, fails while the first one is handled.
    first: BaseException | None = error
    while first is not None and not isinstance(first, WriteError):
        first = first.__context__
    if first is not None:
        return str(first)
    if error.errno not in OF_THE_DISK:
        return None
    return f"cannot write {error.filename or 'a file'!r}: {error.strerror}"
