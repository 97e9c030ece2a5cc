"""The one exception type that means: the user's input is wrong."""


class UserError(ValueError):
    """Wrong input: the message names field, value, what is allowed and what to do.

    The command line prints the message alone and exits with code 2.
    """
