"""Samples fill their budget of tokens, and never exceed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtraining.errors import UserError
from mtraining.evaluate.tasks import SUITES, Draft, SampleMaker, Sources, Task, build_tasks
from mtraining.evaluate.tasks.fit import cut_middle


def generated(essays: Path) -> list[Task]:
    tasks = build_tasks(SUITES, sources=Sources(essays))
    return [task for task in tasks if not task.fixed and task.name not in ("qa_1", "qa_2")]


@pytest.mark.parametrize("length", [4095, 16384])
def test_every_generated_task_fills_its_length(length: int, maker: SampleMaker, essays: Path) -> None:
    for task in generated(essays):
        for number in range(3):
            sample = maker.make(task, length, number)
            used = len(sample.ids) + sample.new_tokens
            assert used <= length, (task.name, number)
            # What is left is less than two units of the largest haystack, a pair of identifiers.
            assert used >= length - max(0.02 * length, 340), (task.name, number, used)


def test_the_budget_is_met_to_the_unit(maker: SampleMaker) -> None:
    """One word a unit: what a search that stopped early would leave unused shows here."""
    task = Task("words", "ruler", 10, lambda a, b: 0.0, lambda size, rng, n: Draft("ab " * size, "?", ("x",)))
    for length in (50, 1000, 30_000):
        left = length - 10 - len(maker.make(task, length, 0).ids)
        assert 0 <= left <= max(3, 0.002 * length)


def test_a_haystack_that_grows_unevenly(maker: SampleMaker) -> None:
    """Needle and instruction weigh far more than the first units do."""
    task = Task(
        "odd", "ruler", 1, lambda a, b: 0.0, lambda size, rng, n: Draft("x" * 900 + "ab" * size, "", ("x",))
    )
    for number in range(2):
        assert 5000 - 12 <= len(maker.make(task, 5000, number).ids) <= 4999


def test_a_sample_that_cannot_fit_is_said(maker: SampleMaker, essays: Path) -> None:
    for task in generated(essays):
        message = f"--lengths: task {task.name} and its answer .* do not fit into 40; use a longer length"
        with pytest.raises(UserError, match=message):
            maker.make(task, 40, 0)
        with pytest.raises(UserError, match=message):
            maker.check(task, 40)
        maker.check(task, 16384)


def test_an_answer_longer_than_the_length_is_said(maker: SampleMaker) -> None:
    """Even where a document could be cut to nothing."""
    task = Task(
        "sum", "infinitebench", 1200, lambda a, b: 0.0, lambda *of: Draft("a book", "", ("x",)), fixed=True
    )
    for refused in (maker.check, lambda task, length: maker.make(task, length, 0)):
        with pytest.raises(UserError, match="task sum and its answer of 1200 tokens do not fit into 1024"):
            refused(task, 1024)
    maker.check(task, 1300)


def test_samples_are_made_once_for_every_attention(maker: SampleMaker, essays: Path) -> None:
    made = []

    def draft(size: int, rng: Any, number: int) -> Draft:
        made.append(number)
        return Draft("ab " * size, "?", ("x",))

    task = Task("words", "ruler", 10, lambda a, b: 0.0, draft)
    first = [maker.make(task, 500, number) for number in range(3)]
    tries = len(made)
    assert [maker.make(task, 500, number) for number in range(3)] == first and len(made) == tries
    maker.make(task, 600, 0)
    assert len(made) > tries


def test_documents_lose_their_middle(maker: SampleMaker) -> None:
    task = Task("doc", "infinitebench", 20, lambda a, b: 0.0,
                lambda size, rng, n: Draft("a" * 400 + "b" * 400, "c", ("x",)), fixed=True, samples=1)  # fmt: skip
    sample = maker.make(task, 220, 0)
    text = maker.tokenizer.decode(sample.ids)
    assert text == "a" * 100 + "b" * 99 + "c" and sample.removed == 601
    assert maker.make(task, 2000, 0).removed == 0
    with pytest.raises(UserError, match="doc has 1 samples"):
        maker.make(task, 220, 1)


@pytest.mark.parametrize("budget", [1, 2, 9, 10, 11])
def test_cutting(budget: int) -> None:
    ids, removed = cut_middle(list(range(10)), budget)
    assert len(ids) == min(budget, 10) and removed == max(0, 10 - budget)
    assert ids == sorted(ids) and (budget == 1 or ids[0] == 0) and ids[-1] == 9


def test_no_end_of_text_between_prompt_and_answer(tokenizer: Any, essays: Path) -> None:
    class Ending:
        """A tokenizer that closes every text."""

        eos_token_id = tokenizer.eos_token_id
        chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            encoded = tokenizer(text)
            encoded["input_ids"].append(self.eos_token_id)
            return encoded

    task = generated(essays)[0]
    assert SampleMaker(Ending()).make(task, 2000, 0).ids[-1] != tokenizer.eos_token_id


def test_templates(tokenizer: Any, essays: Path) -> None:
    with pytest.raises(UserError, match="--template chat: this tokenizer has no chat template"):
        SampleMaker(tokenizer, "chat")
    with pytest.raises(UserError, match="--template 'llama' is not known; choose one of base, chat"):
        SampleMaker(tokenizer, "llama")
    talking = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    talking.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}"
    )
    task = generated(essays)[0]
    sample = SampleMaker(talking, "chat").make(task, 2000, 0)
    text = tokenizer.decode(sample.ids)
    assert text == f"<user>{sample.draft.prompt}<assistant>{sample.draft.cue.lstrip()}"
