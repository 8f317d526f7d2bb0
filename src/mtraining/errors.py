"""How a run ends early: bad input, which a user can mend in one sentence, and a stop that is nobody's mistake.

Also what such sentences are made with: the known name that is nearest to a wrong one, and what an error said.
"""

import difflib
from collections.abc import Iterable


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


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name most like ``word``, by difflib's measure; None where none reaches ``likeness`` (0 to 1)."""
    found = difflib.get_close_matches(word, list(known), 1, likeness)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause " (did you mean 'name'?)" with the nearest known name, or "" where none is near."""
    near = nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
