"""The one exception that means: the person at the keyboard can mend this."""


class UserError(Exception):
    """A mistake that a person can mend; the command line prints it as one line without a traceback.

    The message names the argument, what was found, what was expected and the remedy.
    """
