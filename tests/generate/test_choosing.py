"""The next token, and where an answer ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answers import MESHES, generator_for, prompts, world_of

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.generate import generator
from mtraining.generate.answer import Answer
from mtraining.generate.sampling import Chooser

CPU = torch.device("cpu")


class Letters:
    """A tokenizer whose tokens are letters, but for 0, which is special, and 1 and 2, the halves of an umlaut."""

    eos_token_id = 0

    def decode(self, tokens: list[int], **_: object) -> str:
        halves = {1: b"\xc3", 2: b"\xbc"}
        return b"".join(b"" if t == 0 else halves.get(t, bytes([t])) for t in tokens).decode(errors="replace")


def answered(text: str, stop: tuple[str, ...] = (), limit: int = 100, eos: tuple[int, ...] = (0,)) -> Answer:
    answer = Answer(limit, eos, stop, Letters())
    for byte in text.encode():
        answer.take({0xC3: 1, 0xBC: 2}.get(byte, byte))
    return answer


def test_an_answer_ends_by_length() -> None:
    answer = answered("abcdef", limit=4)
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == ("abcd", "length", 4)


def test_an_answer_ends_by_eos_which_has_no_text() -> None:
    answer = answered("ab\0cd")
    assert (answer.text, answer.finish_reason, answer.tokens) == ("ab", "eos", [97, 98, 0])
    assert answered("ab\0cd", eos=()).finish_reason is None


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo", ("\n",), "one"),
        ("one two three", ("three", " two"), "one"),
        ("a" * 50 + "END" + "b", ("END",), "a" * 50),
        ("sechs f\u00fcnf", ("\u00fcn",), "sechs f"),
        ("\0\0\0\0\0\0ab", ("ab",), ""),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    answer = answered(text, stop, eos=())
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    if not text.startswith("\0"):
        upto = text.index(stop[-1]) + len(stop[-1])
        assert answer.tokens == answered(text[:upto], eos=()).tokens  # not a token longer


def test_a_stop_string_that_does_not_come_ends_nothing() -> None:
    assert answered("abcabc", ("abd",)).finish_reason is None
    assert answered("abcabc", ("abd",)).text == "abcabc"


def test_temperature_and_top_p_give_their_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = 4000
    chooser = Chooser(2.0, 0.8, range(rows), 1, CPU)
    counts = torch.bincount(chooser(logits.expand(rows, -1), 0), minlength=4) / rows
    prob = (logits / 2).softmax(0)
    assert prob[:2].sum() < 0.8 < prob[:3].sum()
    expected = torch.cat([prob[:3] / prob[:3].sum(), torch.zeros(1)])
    assert counts[3] == 0
    assert (counts - expected).abs().max() < 0.03


def test_draws_belong_to_their_row_and_step() -> None:
    logits = torch.zeros(3, 1000)
    three, last = Chooser(1.0, 1.0, (5, 6, 7), 4, CPU), Chooser(1.0, 1.0, (7,), 4, CPU)
    assert three(logits, 2)[2] == last(logits[:1], 2)[0]
    assert len(set(three(logits, 2).tolist())) == 3
    assert three(logits, 2)[2] != three(logits, 3)[2]


def test_a_low_temperature_is_greedy() -> None:
    logits = torch.randn(5, 50)
    assert torch.equal(Chooser(1e-6, 1.0, range(5), 1, CPU)(logits, 0), logits.argmax(-1))
    assert torch.equal(Chooser(3.0, 1e-9, range(5), 1, CPU)(logits, 0), logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-0.5, 1.0), "temperature: -0.5 is no temperature"),
        ((1.0, 0.0), "top_p: 0.0 is no share"),
        ((1.0, 1.5), "top_p: 1.5 is no share"),
        ((0.0, 0.9), "top_p: 0.9 has no effect at temperature 0"),
    ],
)
def test_choices_out_of_range_are_refused(options: tuple[float, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Chooser(*options, (0,), 1, CPU)


def sampled(worker: Worker, mesh: str) -> list[list[int]]:
    """Job: answers drawn at a temperature."""
    made = generator_for(worker, "qwen2", mesh)
    return [one.tokens for one in made.generate(prompts(), 12, temperature=1.0, top_p=0.95, seed=3, eos=())]


@pytest.mark.parametrize("mesh", ["cp2", "cp2x2"])
def test_every_rank_and_ring_draws_the_same(pool: ProcessPool, mesh: str) -> None:
    (alone,) = pool.run(sampled, world=1, mesh="cp1")
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert all(found == alone for found in pool.run(sampled, world=world_of(mesh), mesh=mesh))
    assert mesh in MESHES


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    made = generator_for(None, "qwen2")
    together = made.generate(prompts(), 8, temperature=1.0, seed=[4, 5, 6], eos=())
    for row, prompt in enumerate(prompts()):
        (alone,) = made.generate([prompt], 8, temperature=1.0, seed=4 + row, eos=())
        assert alone.tokens == together[row].tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_end_by_themselves(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the host reads tokens one forward late, as on a GPU."""
    monkeypatch.setattr(generator, "_runs_ahead", lambda device: ahead)
    made = generator_for(None, "qwen2", tokenizer=None)
    free = made.generate(prompts(), 8, eos=())
    ends = [free[0].tokens[2]]  # ends the first row at its third token, at the latest
    found = made.generate(prompts(), 8, eos=ends, keep_logits=True)
    for one, whole in zip(found, free, strict=True):
        kept = next((i + 1 for i, token in enumerate(whole.tokens) if token in ends), 8)
        assert one.tokens == whole.tokens[:kept]
        assert one.finish_reason == ("length" if kept == 8 and whole.tokens[-1] not in ends else "eos")
        assert one.logits is not None and len(one.logits) == kept
    assert len(found[0].tokens) <= 3 and any(len(one.tokens) == 8 for one in found)


@pytest.mark.parametrize("ahead", [False, True])
def test_every_row_has_its_own_limit(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has ended asks for no position beyond its own last one."""
    monkeypatch.setattr(generator, "_runs_ahead", lambda device: ahead)
    made = generator_for(None, "qwen2")
    free = made.generate(prompts(), 8, eos=())
    highest: list[int] = []
    read_out = made.model.read_out

    def watched(ids: torch.Tensor, positions: torch.Tensor, read: Any) -> torch.Tensor:
        if ids.shape[0] == 3:
            highest[:] = torch.cat([positions, torch.tensor(highest or [0] * 3)[:, None]], 1).amax(1).tolist()
        return read_out(ids, positions, read)

    monkeypatch.setattr(made.model, "read_out", watched)
    limits = [3, 8, 1]
    found = made.generate(prompts(), limits, eos=())
    for one, whole, limit in zip(found, free, limits, strict=True):
        assert one.tokens == whole.tokens[:limit] and one.finish_reason == "length"
    assert all(place < len(row) + limit for place, row, limit in zip(highest, prompts(), limits, strict=True))
    with pytest.raises(
        UserError, match="max_new_tokens: 2 numbers for 3 prompts; give one each, or one for all"
    ):
        made.generate(prompts(), [1, 2], eos=())
    with pytest.raises(UserError, match="max_new_tokens: 0 leaves no answer"):
        made.generate(prompts(), [3, 0, 1], eos=())


def test_dense_prompts_are_not_looked_at_for_their_density(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator_for(None, "qwen2")
    (one,) = made.generate(prompts()[:1], 1, recall_rows=4)
    assert one.density == 1 and one.recall == pytest.approx(1)
    monkeypatch.setattr(generator, "Observer", None)
    (same,) = made.generate(prompts()[:1], 1, recall_rows=0)
    assert same.density == 1 and same.recall is None


def test_a_single_token_needs_no_decoding() -> None:
    made = generator_for(None, "qwen2")
    assert [one.tokens for one in made.generate(prompts(), 1, eos=())] == [
        one.tokens[:1] for one in made.generate(prompts(), 4, eos=())
    ]
    assert made.generate([], 4) == []


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([[5], []], {}, "prompts: prompt 1 is empty"),
        ([[5, 97]], {}, "prompts: prompt 0 has token 97, beyond the 97 of the model"),
        ([[5, -1]], {}, "prompts: prompt 0 has token -1, beyond"),
        (
            [[5] * 120],
            {"max_new_tokens": 9},
            "the 120 tokens of prompt 0 and 9 new ones are beyond the 128 positions",
        ),
        ([[5] * 120], {"max_new_tokens": 9}, "rope.type yarn and a rope.factor of at least 1.01"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens: 0 leaves no answer"),
        ([[5]], {"stop": ["x"]}, "stop: stop strings need a tokenizer"),
        ([[5]], {"seed": [1, 2]}, "seed: 2 seeds for 1 prompts"),
    ],
)
def test_bad_input_is_one_sentence(given: list[list[int]], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generator_for(None, "qwen2").generate(given, **{"max_new_tokens": 4, **options})  # type: ignore[arg-type]


def test_beyond_the_positions_if_it_is_asked_for() -> None:
    made = generator_for(None, "qwen2", beyond_positions=True)
    assert len(made.generate(prompts((126,)), 6, eos=())[0].tokens) == 6
