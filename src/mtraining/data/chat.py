"""Conversations -> token ids by a chat template, and which of the tokens are trained.

The ids are those of transformers' `apply_chat_template`. Where the template marks what the assistant says by
``{% generation %}``, so are the trained tokens. Any other template is asked for its rendering of each turn's prompt
(the messages before the turn, and the words that ask the assistant to speak) and of the conversation up to the turn's
end. Both must begin the whole rendering, else nobody can tell which tokens the turn is.
"""

from __future__ import annotations

import re
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
        template = self._tokenizer.get_chat_template(None, chat.tools)
        marked = self.train_on != "all" and _MARK.search(template) is not None
        encoded = self._tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marked,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **chat.options,
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.uint32)
        if not ids.size:
            return f"{REFUSED}: nothing is rendered"
        if self.train_on == "all":
            return ids, None
        # (tokens, 2): where each token begins and ends in the rendered text, in characters
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        turns = chat.turns[-1:] if self.train_on == "last" else chat.turns
        if marked:
            trained = np.asarray(encoded["assistant_masks"], dtype=bool)
            if self.train_on == "last":
                trained &= offsets[:, 1] > self._start(name, chat, turns[0])
            elif chat.prompt:
                trained &= offsets[:, 1] > self._start(name, chat, chat.prompt)
        else:
            if turns[0] == 0:
                return NO_START
            trained = np.zeros(ids.size, dtype=bool)
            for turn in turns:
                start, end = self._start(name, chat, turn), self._end(name, chat, turn)
                trained |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return (ids, trained) if trained.any() else NO_TRAINED

    def _start(self, name: str, chat: Conversation, turn: int) -> int:
        """Where a turn begins in the rendered text: after what the model is given to answer."""
        return self._prefix(name, chat, turn, asks=True) if turn else 0

    def _end(self, name: str, chat: Conversation, turn: int) -> int:
        return self._prefix(name, chat, turn + 1, asks=False)

    def _prefix(self, name: str, chat: Conversation, messages: int, *, asks: bool) -> int:
        """The length of the first messages' rendering, which must begin the whole one."""
        whole = self._render(chat, len(chat.messages), asks=False)
        part = self._render(chat, messages, asks=asks)
        if not whole.startswith(part):
            self._refuse(name, chat, messages, asks)
        return len(part)

    def _render(self, chat: Conversation, messages: int, *, asks: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            chat.messages[:messages],
            tools=chat.tools,
            tokenize=False,
            add_generation_prompt=asks,
            **chat.options,
        )
        return text

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
