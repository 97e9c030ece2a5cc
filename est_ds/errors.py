"""What ends a command with one clear line."""


class UserError(ValueError):
    """Wrong input; the text names field, value, what is allowed and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Failure(RuntimeError):
    """The run cannot go on, though its input was right; every rank raises the same.

    The command line prints it once, without a traceback, and exits with code 1.
    """


class Diverged(Failure):
    """The run cannot go on because of what it computes: it would come to the same again.

    The command line exits with code 3.
    """
