"""The one exception for what a user can mend."""


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence: what is wrong, with which value and where, and what to do. The
    command line prints it alone; every other exception is a fault of the program and keeps its
    traceback.
    """
