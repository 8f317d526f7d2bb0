"""One row's answer as it grows, on the host: when it ends, and what its text is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["eos", "stop", "length"]
_SPARE = 8  # tokens looked at beyond those that a stop string can take: special ones have no text


@dataclass
class Answer:
    """New tokens of one row.

    Attributes:
        limit: tokens at most.
        eos: tokens that end the answer.
        stop: strings that end it; the text ends before the first of them.
        tokenizer: for the text, and needed for ``stop``; may be None.
        tokens: so far, the one that ended the answer included.
        finish_reason: None while the answer goes on.
    """

    limit: int
    eos: Collection[int]
    stop: Sequence[str]
    tokenizer: Any
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, token: int) -> None:
        """Add a token, unless the answer has ended."""
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
        elif self._stopped():
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"

    @property
    def text(self) -> str | None:
        """What was written, special tokens left out; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text = self._decoded(self.tokens)
        return text[: self._first_stop(text)] if self.finish_reason == "stop" else text

    def _stopped(self) -> bool:
        """Whether a stop string is complete; only the last tokens are looked at, then the whole text."""
        if not self.stop:
            return False
        # A token of text has a byte of it at least.
        window = max(len(string.encode()) for string in self.stop) + _SPARE
        recent = self._decoded(self.tokens[-window:])
        if not any(string in recent for string in self.stop):
            return False
        text = self._decoded(self.tokens)
        return self._first_stop(text) < len(text)

    def _first_stop(self, text: str) -> int:
        """Where the first stop string begins; the end of the text where there is none."""
        found = [place for string in self.stop if (place := text.find(string)) >= 0]
        return min(found, default=len(text))

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
