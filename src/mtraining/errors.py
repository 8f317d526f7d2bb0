"""Errors that a user can mend: one sentence that names the option and the remedy."""


class UserError(ValueError):
    """Bad input. The message is one sentence naming the option at fault and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """
