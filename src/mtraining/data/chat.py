"""Conversations -> token ids by a chat template, and which of the tokens are trained.

The ids are those of transformers' `apply_chat_template`. Where the template marks what the assistant says by
``{% generation %}``, the trained tokens are those that overlap a mark, as in transformers.

Any other template is asked for two renderings of each turn. One is its prompt: the messages before it, and the words
that ask the assistant to speak. The other is the conversation up to the turn's end. Both must begin the whole
rendering, else nobody can tell which tokens the turn is. The turn begins where the whole's tokens depart from those of
its prompt, as a completion does in TRL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mtraining.data.conversation import NO_ASSISTANT, Conversation
from mtraining.errors import UserError, first_line

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REFUSED = "the chat template refuses it"
NO_TRAINED = "no token of it is trained: the chat template leaves out what the assistant says"
FORGED = "its text spells a special token of the tokenizer"
NO_START = "it begins with the assistant, and the chat template has no marks to tell where"


@dataclass(frozen=True)
class _Whole:
    """A rendered conversation: its text, ids (tokens,), and each token's characters (tokens, 2)."""

    text: str
    ids: np.ndarray
    offsets: np.ndarray


class ChatEncoder:
    """Renders and encodes conversations with a saved tokenizer.

    Args:
        folder: a Hugging Face tokenizer folder; its chat template is used.
        train_on: ``assistant``, ``last`` or ``all`` (`PrepareOptions.train_on`).
        tokenizer: what messages call the tokenizer.

    Raises:
        UserError: the tokenizer has no chat template, or one that is not valid Jinja.
    """

    def __init__(self, folder: Path, train_on: str, tokenizer: str) -> None:
        from transformers import AutoTokenizer  # seconds to import: only where there are conversations

        self.train_on = train_on
        self._named = f"the chat template of tokenizer '{tokenizer}'"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not self._tokenizer.chat_template:
            raise UserError(
                f"tokenizer '{tokenizer}' has no chat template to render conversations by; give one by --chat-template"
            )

    def encode(self, name: str, chat: Conversation) -> tuple[np.ndarray, np.ndarray | None] | str:
        """The tokens of a conversation, or why it cannot be used.

        Returns:
            (ids, trained): uint32 and bool, both of shape (tokens,); None for the second where all tokens are trained.

        Raises:
            UserError: the template is at fault, not the conversation.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        if self.train_on != "all" and not chat.turns:
            return NO_ASSISTANT
        if self._special.search(_all_text([chat.messages, chat.tools, chat.options])):
            return FORGED
        try:
            return self._encode(name, chat)
        except UserError:
            raise
        except TemplateSyntaxError as error:
            raise UserError(
                f"{self._named} is not valid Jinja (line {error.lineno}: {first_line(error)}); mend it, or give "
                "another by --chat-template"
            ) from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            return f"{REFUSED}: {first_line(error)}"

    def _encode(self, name: str, chat: Conversation) -> tuple[np.ndarray, np.ndarray | None] | str:
        text, marks = self._render(chat, len(chat.messages))
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.uint32)
        if not ids.size:
            return f"{REFUSED}: nothing is rendered"
        if self.train_on == "all":
            return ids, None
        # (tokens, 2): where each token begins and ends in the rendered text, in characters
        whole = _Whole(text, ids, np.asarray(encoded["offset_mapping"], dtype=np.int64))
        turns = chat.turns[-1:] if self.train_on == "last" else chat.turns
        trained = np.zeros(ids.size, dtype=bool)
        if marks is not None:
            for first, end in marks:
                trained |= (whole.offsets[:, 1] > first) & (whole.offsets[:, 0] < end)
            least = turns[0] if self.train_on == "last" else chat.prompt
            trained[: self._tokens(name, chat, whole, least, asks=True)] = False
        elif turns[0] == 0:
            return NO_START
        else:
            for turn in turns:
                start = self._tokens(name, chat, whole, turn, asks=True)
                end = self._tokens(name, chat, whole, turn + 1, asks=False)
                trained[start:end] = True
        return (ids, trained) if trained.any() else NO_TRAINED

    def _render(
        self, chat: Conversation, messages: int, *, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The first messages as text, and which characters the template marks; None for a template without marks.

        What `apply_chat_template` does inside. Its own mask is not used: in older releases of transformers, a mark that
        ends in white space could reach to the end of the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(None, chat.tools)
        marked = self.train_on != "all" and _MARK.search(template) is not None
        texts, marks = render_jinja_template(
            conversations=[chat.messages[:messages]],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=asks,
            **{**self._tokenizer.special_tokens_map, **chat.options},
        )
        return texts[0], marks[0] if marked else None

    def _tokens(self, name: str, chat: Conversation, whole: _Whole, messages: int, *, asks: bool) -> int:
        """How many tokens of the whole are those of its first messages, rendered and encoded alone."""
        if messages == 0:
            return 0
        if messages == len(chat.messages) and not asks:
            return int(whole.ids.size)
        part, _ = self._render(chat, messages, asks=asks)
        if not asks and not whole.text.startswith(part):
            # Some templates, such as Phi-3's, end every conversation, so the first messages alone too.
            part = part.removesuffix(self._tokenizer.eos_token or "")
        if not whole.text.startswith(part):
            self._refuse(name, chat, messages, asks)
        # Text is cut at special tokens before it is encoded, so what stands before the last one is encoded alike.
        cut = max((match.start() for match in self._special.finditer(part)), default=0)
        same = int(np.argmax(whole.offsets[:, 1] > cut)) if cut else 0
        start = int(whole.offsets[same, 0]) if cut else 0
        tail = self._tokenizer(part[start:], add_special_tokens=False)["input_ids"]
        rest = whole.ids[same : same + len(tail)]
        differs = np.flatnonzero(rest != np.asarray(tail[: rest.size], dtype=np.uint32))
        return same + (int(differs[0]) if differs.size else int(rest.size))

    def _refuse(self, name: str, chat: Conversation, messages: int, asks: bool) -> NoReturn:
        what = "and a request for an answer" if asks else "alone"
        last = "" if self.train_on == "last" else "--train-on last, "
        raise UserError(
            f"'{name}': {self._named} renders the first {messages} of {len(chat.messages)} messages {what} otherwise "
            f"than at the beginning of the whole, so which tokens the assistant says is unknown; use {last}"
            "--train-on all, or by --chat-template one that marks them with {% generation %}"
        )

    @cached_property
    def _special(self) -> re.Pattern[str]:
        tokens = [t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special]
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _all_text(value: Any) -> str:
    """Every string of a nested value, apart from one another."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\0".join(map(_all_text, value.values()))
    return "\0".join(map(_all_text, value)) if isinstance(value, list) else ""
