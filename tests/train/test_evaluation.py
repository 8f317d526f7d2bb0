"""Evaluation while training: what it measures, on any grid, and that it changes nothing of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import UNSEEN, differing, evaluated, raw_config, run_job

import mtraining.train.loop as loop
from distributed import ProcessPool, Worker
from mtraining.data import TokenShards
from mtraining.generate import Generator
from mtraining.train.config import parse_config
from mtraining.train.evaluation import Evaluation
from mtraining.train.heldout import sequence_starts
from mtraining.train.metrics import read_metrics
from mtraining.train.named import find_model
from mtraining.train.store import CheckpointStore

# -- what is measured --------------------------------------------------------------------------------------------------


def test_sequences_begin_documents_and_second_ones_come_last(unseen: Path) -> None:
    shards = TokenShards(unseen)
    names = [shards.name(number) for number in range(4)]
    assert shards.lengths.tolist() == [UNSEEN[int(name[6])] + 1 for name in names]
    starts = sequence_starts(shards, 300, "documents", 100)
    begun = [shards.document_at(int(start)) for start in starts]
    within = [int(start - shards.starts[document]) for start, document in zip(starts, begun, strict=True)]
    # 901, 301 and 701 tokens have 3, 1 and 2 sequences of 300; 10 tokens have none.
    assert list(zip([names[d][6] for d in begun], within, strict=True)) == [
        ("1", 0), ("2", 0), ("3", 0), ("1", 300), ("3", 300), ("1", 600),
    ]  # fmt: skip
    assert sequence_starts(shards, 300, "documents", 4).tolist() == starts[:4].tolist()
    assert sequence_starts(shards, 902, "documents", 4).tolist() == []
    assert sequence_starts(shards, 700, "concat", 4).tolist() == [0, 700]


def test_losses_are_those_of_transformers(tmp_path: Path, shards: Path, unseen: Path) -> None:
    """Dense, by position and in all, at two lengths, one of which the layout cannot deal without padding."""
    raw = raw_config(
        tmp_path / "run", shards, train={"steps": 2, "warmup_steps": 0}, checkpoint={"export": True},
        evaluate={"data": str(unseen), "every": 5, "lengths": [256, 75], "attention": ["dense"], "bucket": 30},
    )  # fmt: skip
    loop.train(parse_config(raw))
    first, last = evaluated(read_metrics(tmp_path / "run"))
    assert (first["step"], last["step"]) == (0, 2)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    data = TokenShards(unseen)
    for row, length in zip(last["held_out"], (75, 256), strict=True):
        starts = sequence_starts(data, length, "documents", 32)
        assert (row["attention"], row["length"], row["sequences"]) == ("dense", length, len(starts))
        windows = torch.stack([torch.from_numpy(data.gather(range_of(start, length))) for start in starts])
        with torch.no_grad():
            logits = model(input_ids=windows).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
        assert row["tokens"] == losses.numel()
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        # The token at position p is foreseen by entry p - 1.
        edges = range(0, length, 30)
        by_position = [losses[:, max(edge - 1, 0) : edge + 29].mean().item() for edge in edges]
        assert row["by_position"] == pytest.approx(by_position, rel=1e-5)
        for number, mine in enumerate(row["by_sequence"]):
            expected = [losses[number, max(edge - 1, 0) : edge + 29].mean().item() for edge in edges]
            assert mine == pytest.approx(expected, rel=1e-5)
        assert row["documents"] == [data.name(data.document_at(int(start))) for start in starts]
    assert last["held_out_loss"] == last["held_out"][1]["loss"] < first["held_out_loss"]


def range_of(start: int, length: int) -> Any:
    import numpy as np

    return np.arange(int(start), int(start) + length)


SPARSE = {"top_p": 0.3, "slash_by": "block", "slash_density": 0.2, "window": 3, "max_columns": 12}


def test_the_runs_own_attention_is_read_by(tmp_path: Path, shards: Path, unseen: Path) -> None:
    """A pattern that leaves much out foresees otherwise than dense attention does, as evaluate measures it too."""
    raw = raw_config(
        tmp_path, shards, pattern=SPARSE, train={"steps": 2, "warmup_steps": 0},
        evaluate={"data": str(unseen), "every": 2, "attention": ["train", "dense"], "max_sequences": 2},
    )  # fmt: skip
    loop.train(parse_config(raw))
    own, dense = evaluated(read_metrics(tmp_path))[-1]["held_out"]
    assert (own["attention"], dense["attention"], own["sequences"]) == ("train", "dense", 2)
    assert abs(own["loss"] - dense["loss"]) > 1e-5
    named = find_model(str(tmp_path))
    data = TokenShards(unseen)
    for row, pattern in ((own, named.patterns(2)), (dense, "dense")):
        generator = Generator(
            named.build("float32", torch.device("cpu")), pattern=pattern, layout="contiguous"
        )
        nll = torch.cat(
            [
                generator.token_nll(data.gather(range_of(start, 256)).tolist())
                for start in sequence_starts(data, 256, "documents", 2)
            ]
        )
        assert row["loss"] == pytest.approx(nll.mean().item(), rel=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pool: ProcessPool, shards: Path, unseen: Path) -> Any:
    """What one process measures before the first step, at lengths with 19 and 6 sequences."""
    return grid_job_on(tmp_path_factory.mktemp("alone"), pool, shards, unseen, {})


def grid_job_on(folder: Path, pool: ProcessPool, shards: Path, unseen: Path, grid: dict[str, int]) -> Any:
    raw = raw_config(
        folder, shards, parallel=grid, pattern={**SPARSE, "max_columns": 16},
        train={"steps": 1, "warmup_steps": 0, "micro_batch_size": 1},
        evaluate={"data": str(unseen), "every": 5, "lengths": [100, 256], "attention": ["train", "dense"]},
    )  # fmt: skip
    world = grid.get("dp", 1) * grid.get("cp", 1)
    return evaluated(pool.run(run_job, world=world, raw=raw)[0])[0]


@pytest.mark.parametrize(
    "grid",
    [
        {"dp": 2},
        {"cp": 2},
        pytest.param({"dp": 4}, marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param({"dp": 2, "cp": 2}, marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param({"cp": 4, "cp_outer": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_grid_measures_the_same(
    tmp_path: Path, pool: ProcessPool, shards: Path, unseen: Path, alone: dict[str, Any], grid: dict[str, int]
) -> None:
    found = grid_job_on(tmp_path, pool, shards, unseen, grid)
    assert [row["sequences"] for row in found["held_out"]] == [19, 6, 19, 6]
    if "cp" not in grid:
        assert found == alone  # sums in the order of the sequences: bit for bit
    for row, expected in zip(found["held_out"], alone["held_out"], strict=True):
        assert row["tokens"] == expected["tokens"] == row["sequences"] * (row["length"] - 1)
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["by_position"] == pytest.approx(expected["by_position"], rel=1e-5)


# -- what stays as it was ----------------------------------------------------------------------------------------------


def drawing_suite(*_: Any) -> Callable[[Generator, Callable[[], bool]], list[dict[str, Any]] | None]:
    """A suite that answers, and that draws random numbers as it does."""

    def ask(generator: Generator, stopped: Callable[[], bool]) -> list[dict[str, Any]] | None:
        if stopped():
            return None
        (answer,) = generator.generate([list(range(40))], 3, temperature=1.0)
        score = float(len(answer.tokens)) + float(torch.rand(())) * 0
        return [{"suite": "needle", "task": "drawn", "length": 40, "samples": 1, "score": score}]

    return ask


def suite_job(worker: Worker, raw: dict[str, Any]) -> list[dict[str, Any]]:
    return read_metrics(loop.train(parse_config(raw), drawing_suite).run)


HELD = {"refresh": {"every_n": 3}, "coverage": 8, **SPARSE}


@pytest.mark.parametrize(
    "grid",
    [
        {},
        pytest.param({"cp": 2}, marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param({"dp": 2, "cp": 2}, marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param({"train": {"recompute": "keep_attention"}}, marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param(
            {"train": {"dtype": "bf16", "recompute": "full", "offload": True}}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_training_is_the_same_with_and_without(
    tmp_path: Path, pool: ProcessPool, shards: Path, unseen: Path, grid: dict[str, Any]
) -> None:
    """Bit for bit: losses, norms, statistics of attention, and every tensor saved: weights, moments, held and counted
    indices, random state."""
    world = grid.get("dp", 1) * grid.get("cp", 1)
    evaluate = {
        "data": str(unseen), "every": 1, "max_sequences": 3, "lengths": [100, 256], "attention": ["train", "dense"],
        "suites": ["needle"],
    }  # fmt: skip
    common: dict[str, Any] = {
        "parallel": {name: size for name, size in grid.items() if name != "train"}, "pattern": HELD,
        "log": {"every": 1, "recall_rows": 8}, "train": {"steps": 4, "micro_batch_size": 1, **grid.get("train", {})},
    }  # fmt: skip
    plain = pool.run(suite_job, world=world, raw=raw_config(tmp_path / "a", shards, **common))[0]
    raw = raw_config(tmp_path / "b", shards, **common, evaluate=evaluate)
    with_evaluation = pool.run(suite_job, world=world, raw=raw)[0]
    assert len(evaluated(with_evaluation)) == 5 and not evaluated(plain)
    clock = ("tokens_per_second", "step_seconds", "memory")
    steps = [
        [
            {key: value for key, value in record.items() if key not in clock and not key.startswith("ring_")}
            for record in records
            if "loss" in record
        ]
        for records in (plain, with_evaluation)
    ]
    assert steps[0] == steps[1]
    for step in (3, 4):
        saved = [CheckpointStore(tmp_path / name).path(step) for name in ("a", "b")]
        assert differing(*saved, tmp_path) == []


def test_no_parameter_stays_gathered(tmp_path: Path, shards: Path, unseen: Path) -> None:
    """What an evaluation gathers and leaves would be memory that training does not have."""
    from torch.distributed.tensor import DTensor

    seen = []
    run = Evaluation.run

    def look(self: Evaluation, *args: Any) -> Any:
        record = run(self, *args)
        seen.append(all(isinstance(parameter, DTensor) for parameter in self._model.parameters()))
        return record

    Evaluation.run = look  # type: ignore[method-assign]
    try:
        raw = raw_config(
            tmp_path,
            shards,
            train={"steps": 1, "warmup_steps": 0},
            evaluate={"data": str(unseen), "every": 1},
        )
        loop.train(parse_config(raw))
    finally:
        Evaluation.run = run  # type: ignore[method-assign]
    assert seen == [True, True]
