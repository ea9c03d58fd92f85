"""Errors that the user can correct: their exception, texts of others in them, an exit status."""

import difflib
from collections.abc import Iterable

INTERRUPTED = 130  # as in shells: 128 and the number of SIGINT


class UserError(ValueError):
    """Raised when an input of the user cannot be used.

    The message is one sentence: what is wrong with which value where, and what to do. The command
    line prints the message alone. Any other exception is a bug and keeps its traceback.

    torch re-raises the exception of a data-loader worker in the main process as
    ``type(error)(formatted_traceback)``. A formatted traceback ends with the name of the class and
    the message, so the constructor keeps what follows the name.

    Args:
        message: Message, or a formatted traceback that ends with it.
    """

    def __init__(self, message: str) -> None:
        cls = type(self)
        super().__init__(message.rpartition(f"{cls.__module__}.{cls.__qualname__}: ")[2].rstrip())


class Diverged(UserError):
    """Raised when the loss or the network is no longer finite; the message says how to go on."""


class LostRank(UserError):
    """Raised on a rank that cannot go on because another rank has failed or hangs.

    Attributes:
        is_printed: Whether the message has been printed, on this rank or on another one of the
            same machine.
    """

    is_printed = False


class Interrupted(SystemExit):
    """Raised to end the run after a signal.

    Args:
        code: Exit status, usually 128 + signal number.
        message: Last message to the user; may be empty.
        job: Job of Slurm to requeue once the run has ended; None for none.
    """

    def __init__(self, code: int, message: str = "", job: str | None = None) -> None:
        super().__init__(code)
        self.message = message
        self.job = job


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the :class:`UserError` that caused an exception, or None.

    jsonargparse wraps exceptions of constructors and of links by ``raise ... from``, so this
    follows ``__cause__``. It does not follow ``__context__``: an exception raised while a user
    error was being handled is a bug.

    Args:
        error: Exception to search from, itself included.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``"1 error"``, ``"2 errors"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the question whether the most similar known name was meant; empty if none is."""
    similar = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f" (did you mean {similar[0]}?)" if similar else ""


def brief(error: Exception) -> str:
    """Return the first line of an exception's text, after its type unless it is a ValueError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]
