"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence: what is wrong, with which value and where, and what to do. The
    command line prints it alone; every other exception is a fault of the program and keeps its
    traceback.

    torch hands an exception of a data-loader worker to the main process as its class and its
    formatted traceback, and calls the class with that text. Python ends such a text with the
    class's name and the message, so the message is what follows the name.

    Args:
        message: The sentence, or a formatted traceback that ends with it.
    """

    def __init__(self, message: str) -> None:
        cls = type(self)
        super().__init__(message.rpartition(f"{cls.__module__}.{cls.__qualname__}: ")[2].rstrip())


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the user error behind an exception, or None.

    jsonargparse wraps what a constructor or the computation of a link raises into exceptions of its
    own, with ``raise ... from``; so the explicit causes are followed, and those alone: an exception
    that came up while a user error was handled is a fault of its own.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error
