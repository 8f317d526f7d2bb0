"""How a run ends early: bad input, which a user can mend in one sentence, and a stop that is nobody's mistake."""


class UserError(ValueError):
    """Bad input. The message is one sentence naming the option at fault and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """


SAVED = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to retry"


class RunStopped(Exception):
    """A run that ended through no fault of its input: a rank died, or a signal came. `code` is the exit status.

    `code` is `SAVED` when the run was asked to stop and everything it had done is in a checkpoint, 128 + the signal's
    number when a signal ended it at once, 1 when a rank died or failed.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
