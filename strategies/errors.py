"""The one exception that a user is meant to read."""


class KernelfuzzError(Exception):
    """A problem that the user can mend.

    The text is one line that names the thing and the remedy. The command line prints it without a traceback and exits
    with status 2.
    """
