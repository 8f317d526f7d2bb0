"""Conversations as rows hold them, messages with roles or a prompt and its completion, and what is wrong with a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROMPT, COMPLETION = "prompt", "completion"
TOOLS, TEMPLATE_OPTIONS = "tools", "chat_template_kwargs"
"""Columns beside a conversation that its chat template is given too."""

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Where datasets keep what the assistant thought, apart from the content of its message."""

NO_MESSAGES = "no messages"
NOT_MESSAGES = "messages are not a list"
NOT_MAPPING = "a message is not a mapping"
NO_ROLE = "a message has no role"
WRONG_ROLE = f"a message has another role than {', '.join(ROLES)}"
NO_CONTENT = "a message has no content"
NOT_PLAIN = "a message has content other than text"
NO_ASSISTANT = "no assistant turn"
NOT_PAIR = "prompt and completion are neither both text nor both messages"
EMPTY_COMPLETION = "empty completion"
NOT_TOOLS = "tools are not a list of mappings, nor JSON of one"
NOT_OPTIONS = f"{TEMPLATE_OPTIONS} is not a mapping"


@dataclass(frozen=True)
class Conversation:
    """Messages to render, and what else their template is given.

    Attributes:
        messages: mappings with a role and a content, as the row has them.
        prompt: how many of the messages are the prompt, of which nothing is trained; 0 for none.
        tools: JSON schemas of the functions that the assistant may call.
        options: further variables of the template.
    """

    messages: list[dict[str, Any]]
    prompt: int = 0
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> list[int]:
        """Which messages the assistant says after the prompt."""
        return [n for n, m in enumerate(self.messages) if n >= self.prompt and m["role"] == ASSISTANT]


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion as plain text, which no template renders."""

    prompt: str
    completion: str


def read_messages(row: Mapping[str, Any], column: str) -> Conversation | str:
    """The conversation of a row, or what is wrong with it."""
    messages = row.get(column)
    return _fault(messages) or _conversation(row, messages, 0)


def read_pair(row: Mapping[str, Any], column: str) -> Conversation | Completion | str:
    """The prompt and completion of a row, both text or both messages, or what is wrong with them."""
    prompt, completion = row.get(column), row.get(COMPLETION)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion) if completion.strip() else EMPTY_COMPLETION
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return NOT_PAIR
    return _fault(prompt) or _fault(completion) or _conversation(row, [*prompt, *completion], len(prompt))


def _conversation(row: Mapping[str, Any], messages: Any, prompt: int) -> Conversation | str:
    tools, options = row.get(TOOLS), row.get(TEMPLATE_OPTIONS) or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return NOT_TOOLS
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return NOT_TOOLS
    if not isinstance(options, dict):
        return NOT_OPTIONS
    # Interfaces write null for what a message lacks, and templates would print it as a word.
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return Conversation(given, prompt, tools or None, options)


def _fault(messages: Any) -> str:
    """What is wrong with a list of messages, or nothing."""
    if not isinstance(messages, list):
        return NOT_MESSAGES
    if not messages:
        return NO_MESSAGES
    return next((fault for message in messages if (fault := _fault_of_message(message))), "")


def _fault_of_message(message: Any) -> str:
    if not isinstance(message, dict):
        return NOT_MAPPING
    role, content = message.get("role"), message.get("content")
    if role is None:
        return NO_ROLE
    if role not in ROLES:
        return WRONG_ROLE
    acts = role == ASSISTANT and any(message.get(key) for key in ("tool_calls", *REASONING))
    if content is None:
        return "" if acts else NO_CONTENT
    if isinstance(content, list):
        parts = [
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if len(parts) < len(content):
            return NOT_PLAIN
        content = "".join(parts)
    if not isinstance(content, str):
        return NOT_PLAIN
    # A tool may answer nothing, and a system message is often left empty; nobody asks or says nothing.
    blank_is_wrong = role in ("user", ASSISTANT) and not acts
    return NO_CONTENT if blank_is_wrong and not content.strip() else ""
