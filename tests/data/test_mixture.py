"""Mixtures: weights, caps on repetition, and sources that do not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prepared import save_llama_like, write_rows

from mtraining.data import DataSource, PrepareOptions, SequenceDataset, TokenShards, build_loader, prepare
from mtraining.data.mixture import Exhausted, Mixture
from mtraining.errors import UserError


def shards(folder: Path, name: str, windows: int, tokenizer: str = "byte") -> TokenShards:
    """Documents of one sequence of 16 each, told by the source's letter."""
    source = write_rows(folder / f"{name}.jsonl", {f"{name}{i}": f"{name[0]} " * 8 for i in range(windows)})
    options = PrepareOptions(sources=(str(source),), out=folder / name, name_column="id", tokenizer=tokenizer)
    prepare(options, progress=False)
    return TokenShards(folder / name)


@pytest.fixture
def sources(tmp_path: Path) -> list[DataSource]:
    """20 sequences of code, 30 of books, 50 of chat."""
    return [
        DataSource(shards(tmp_path, "code", 20), "code", 1.0),
        DataSource(shards(tmp_path, "books", 30), "books", 2.0, 1.0),
        DataSource(shards(tmp_path, "talk", 50), "talk", 5.0),
    ]


@pytest.mark.parametrize("mode", ["documents", "concat", "packed"])
def test_weights_hold_in_every_step_and_mode(sources: list[DataSource], mode: str) -> None:
    sources = [DataSource(one.shards, one.name, one.weight) for one in sources]
    dataset = SequenceDataset(sources, 16, mode=mode, seed=3)
    # Each begins with its source's letter, but where concat cuts documents elsewhere.
    for step, batch in enumerate(build_loader(dataset, global_batch=16, steps=20)):
        counts = dict.fromkeys("cbt", 0)
        for row in batch["input_ids"].tolist():
            counts[next(chr(token) for token in row if chr(token) in counts)] += 1
        for letter, share in zip("cbt", (1 / 8, 2 / 8, 5 / 8), strict=True):
            assert abs(counts[letter] - 16 * share) <= 2, (step, counts)
    counted = dataset.counts(320)
    assert [one.sequences for one in counted] == pytest.approx([40, 80, 200], abs=2)
    assert sum(one.share for one in counted) == pytest.approx(1)
    assert counted[0].epochs == counted[0].sequences / len(dataset.windows[0])


def test_a_source_at_its_cap_leaves_its_share_to_the_others(sources: list[DataSource]) -> None:
    """30 sequences of books, of 2 parts in 8, end at about sample 120; then code has 1 part in 6, talk 5."""
    dataset = SequenceDataset(sources, 16, seed=3)
    read = [dataset._of(dataset.sample(n)) for n in range(600)]
    books = [number for source, number in read if source == 1]
    assert sorted(books) == list(range(30))  # each once, as max_epochs 1 says
    last = max(n for n, (source, _) in enumerate(read) if source == 1)
    assert 110 <= last <= 130
    after = [source for source, _ in read[last + 1 :]]
    assert after.count(0) / len(after) == pytest.approx(1 / 6, abs=0.01)
    assert [one.sequences for one in dataset.counts(600)] == [[s for s, _ in read].count(i) for i in range(3)]


def test_each_source_has_epochs_of_its_own(sources: list[DataSource]) -> None:
    dataset = SequenceDataset(sources, 16, seed=3)
    code = [n for source, n in (dataset._of(dataset.sample(n)) for n in range(400)) if source == 0][:40]
    assert sorted(code[:20]) == sorted(code[20:]) == list(range(20))
    assert code[:20] != code[20:]


def test_an_end_of_all_sources_is_told(sources: list[DataSource]) -> None:
    capped = [DataSource(one.shards, one.name, one.weight, 2.0) for one in sources]
    dataset = SequenceDataset(capped, 16, seed=3)
    assert [one.epochs for one in dataset.counts(200)] == [2.0, 2.0, 2.0]
    for asked in (lambda: dataset.sample(200), lambda: dataset.counts(201)):
        with pytest.raises(UserError, match=r"all reach their max_epochs after 200 sequences, .* reads 201"):
            asked()
    alone = SequenceDataset(capped[:1], 16)
    assert alone.counts(40)[0].sequences == 40
    with pytest.raises(UserError, match="after 40 sequences"):
        alone.sample(40)


def test_a_resumed_run_needs_no_history(sources: list[DataSource]) -> None:
    whole = [SequenceDataset(sources, 16, seed=3).sample(n) for n in range(300)]
    fresh = SequenceDataset(sources, 16, seed=3)
    assert [fresh.sample(n) for n in range(299, -1, -1)] == whole[::-1]


def test_long_runs_and_every_chunk() -> None:
    """Caps that fall in different chunks of the schedule, looked up in any order."""
    mixture = Mixture([3, 1, 1], [30_000, 50_000, None], seed=9)
    picks = [mixture.locate(n)[0] for n in range(0, 200_000, 997)]
    assert picks == [
        Mixture([3, 1, 1], [30_000, 50_000, None], seed=9).locate(n)[0] for n in range(0, 200_000, 997)
    ]
    assert mixture.counts(30_000) == pytest.approx([18_000, 6_000, 6_000], abs=3)
    assert mixture.counts(120_000)[:2] == [30_000, pytest.approx(45_000, abs=3)]
    assert mixture.counts(200_000) == [30_000, 50_000, 120_000]
    seen = [0, 0, 0]
    for n in range(20_000):
        source, before = mixture.locate(n)
        assert before == seen[source]
        seen[source] += 1
    with pytest.raises(Exhausted):
        Mixture([1, 1], [10, 10], None).locate(20)
    assert Mixture([1, 1], [10, 10], None).counts(20) == [10, 10]


def test_the_schedule_is_pinned() -> None:
    """Another machine or library must not mix a resumed run otherwise."""
    mixture = Mixture([1.0, 2.0, 5.0], [None] * 3, seed=3)
    assert "".join(str(mixture.locate(n)[0]) for n in range(24)) == "212212202122021221220212"


def test_identity_knows_every_source_its_weight_and_its_cap(sources: list[DataSource]) -> None:
    def identity(given: list[DataSource]) -> str:
        return SequenceDataset(given, 16).identity

    first = identity(sources)
    code, books, talk = sources
    others = [
        [code, books],
        [code, talk, books],
        [DataSource(code.shards, "code", 2.0), books, talk],
        [code, DataSource(books.shards, "books", 2.0), talk],
        [DataSource(talk.shards, "code"), books, talk],
    ]
    assert len({first, *map(identity, others)}) == len(others) + 1
    assert identity([DataSource(code.shards, "another name"), books, talk]) == first
    # A mixture of one is that one, by whatever option it is named.
    assert identity([code]) == SequenceDataset(code.shards, 16).identity == code.shards.identity


def test_describe_names_the_source(sources: list[DataSource]) -> None:
    dataset = SequenceDataset(sources, 16)
    assert dataset.describe(25) == "books: document 'books5', tokens 0..16"
    assert dataset.render().splitlines()[2].startswith("talk: 50 sequences")


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path, sources: list[DataSource]) -> None:
    for name, bos in (("plain", False), ("with_bos", True)):
        save_llama_like(tmp_path / name, with_bos=bos)
    other = shards(tmp_path, "ab", 3, str(tmp_path / "plain"))
    with pytest.raises(
        UserError, match=r"data.sources: '.*code' and '.*ab' .* different tokenizers \(token "
    ):
        SequenceDataset([sources[0], DataSource(other, "ab")], 8)
    same = shards(tmp_path, "ba", 3, str(tmp_path / "with_bos"))  # the same words, other habits
    SequenceDataset([DataSource(other, "ab"), DataSource(same, "ba")], 8)
    same.eos_token_id = 5
    with pytest.raises(UserError, match="documents end with token 2 in the one and 5 in the other"):
        SequenceDataset([DataSource(other, "ab"), DataSource(same, "ba")], 8)


def test_ids_outside_the_vocabulary_name_their_source(sources: list[Any]) -> None:
    with pytest.raises(UserError, match=r"code': document 'code0' holds token id 256"):
        SequenceDataset(sources, 16, vocab_size=200)
