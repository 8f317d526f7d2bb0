"""What a run logs of its attention and gradients, in metrics and TensorBoard, on one rank and on a ring."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import make_data, raw_config, run_job, tiny_config
from torch import nn

from distributed import ProcessPool
from mtraining.data import PrepareOptions, prepare
from mtraining.train.about import ABOUT
from mtraining.train.balance import RING
from mtraining.train.loop import train
from mtraining.train.metrics import read_metrics
from mtraining.train.optim import layer_gradient_norms
from mtraining.train.store import CheckpointStore

LOG = {"every": 1, "recall_rows": 16}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    config = tiny_config(
        tmp_path_factory.mktemp("alone") / "run",
        shards,
        train={"steps": 3},
        log=LOG | {"trackers": ["tensorboard"]},
    )
    return train(config).run


def test_a_logged_step_has_every_number(run: Path) -> None:
    first, second, last = read_metrics(run)
    assert "layer_stability" not in first
    for record in (second, last):
        assert all(0 < share <= 1 for share in record["layer_stability"])
        assert record["recall"] == pytest.approx(sum(record["layer_recall"]) / 2)
        for layer, heads in zip(record["layer_recall"], record["recall_by_head"], strict=True):
            assert len(heads) == 4 and layer == pytest.approx(sum(heads) / 4, abs=1e-4)
        # The layers' gradients are a part of all, with embeddings and the last norm beside them.
        assert 0 < math.hypot(*record["layer_grad_norm"]) < record["grad_norm"]
        assert len(record["uncovered_by_distance"]) == len(record["uncovered_run_by_distance"]) == 4
        # 256 tokens have no distance beyond 1K, and every token attends to itself.
        assert record["uncovered_by_distance"][1:] == [0, 0, 0]
    runs = [record["uncovered_run_by_distance"][0] for record in (first, second, last)]
    assert runs == sorted(runs, reverse=True)
    assert (run / ABOUT).is_file()


def test_tensorboard_has_curves_of_layers_and_heads(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    scalars = board.Tags()["scalars"]
    for name in ("layer_recall", "layer_stability", "layer_grad_norm"):
        assert {f"{name}/00", f"{name}/01"} <= set(scalars)
    assert "uncovered_by_distance/03" in scalars
    heads = {f"recall_by_head/{layer:02d}/{head:02d}" for layer in range(2) for head in range(4)}
    assert heads == {name for name in scalars if name.startswith("recall_by_head")}
    recall = read_metrics(run)[-1]["recall_by_head"][1][2]
    assert board.Scalars("recall_by_head/01/02")[-1].value == pytest.approx(recall)


@pytest.mark.parametrize("grid", [{"cp": 2}, {"dp": 2}])
def test_a_ring_and_replicas_log_what_one_process_does(
    run: Path, grid: dict[str, int], tmp_path: Path, pool: ProcessPool, shards: Path
) -> None:
    raw: dict[str, Any] = raw_config(
        tmp_path / "run", shards, train={"steps": 1, "warmup_steps": 0}, log=LOG, parallel=grid
    )
    if "dp" in grid:  # the observed micro-batch is then another one
        raw["train"] |= {"micro_batch_size": 2}
    (found, *_), *_ = pool.run(run_job, world=2, raw=raw)
    expected = read_metrics(run)[0]
    assert found["layer_grad_norm"] == pytest.approx(expected["layer_grad_norm"], rel=1e-3)
    assert found["uncovered_by_distance"] == expected["uncovered_by_distance"]
    assert (tmp_path / "run" / RING).is_file() == ("cp" in grid)
    if "cp" in grid:
        lanes = json.loads((tmp_path / "run" / RING).read_text())
        assert (lanes["step"], lanes["ranks"]) == (1, [0, 1])
        for phase in ("forward", "backward"):
            for what in ("compute", "exposed"):
                means = [sum(step) / 2 for step in zip(*lanes[phase][what], strict=True)]
                assert means == pytest.approx(found[f"ring_{phase}_{what}"]), (phase, what)
            assert lanes[phase]["compute"][0] != lanes[phase]["compute"][1]
        assert found["layer_recall"] == pytest.approx(expected["layer_recall"], rel=1e-3)


def test_norms_of_layers_are_those_of_their_gradients() -> None:
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2), nn.LayerNorm(2)])
    torch.manual_seed(0)
    layers[1](layers[0](torch.randn(5, 3))).square().sum().backward()
    expected = [
        math.sqrt(sum(float(p.grad.square().sum()) for p in layer.parameters() if p.grad is not None))
        for layer in layers
    ]
    assert layer_gradient_norms(layers).tolist() == pytest.approx(expected)
    assert expected[0] > 0 and expected[2] == 0


@pytest.mark.slow
def test_a_killed_run_covers_what_an_unbroken_one_does_on_another_grid(
    tmp_path: Path, pool: ProcessPool
) -> None:
    """Killed after its third step, and gone on with from the second on a ring of two."""
    text = " ".join(f"{number} and {number * number}," for number in range(800))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    shards = tmp_path / "shards"
    prepare(PrepareOptions(sources=(str(tmp_path / "book.txt"),), out=shards, kind="text"), progress=False)
    # Long enough for distances beyond 1K. Steps that change little: a weight that rounds otherwise on the ring must not
    # change an index.
    options = {"seq_len": 2048, "lr": 1e-7, "schedule": "constant", "warmup_steps": 0}
    options |= {"batch_size": 1, "micro_batch_size": 1}
    thin = {"top_p": 0.3, "max_columns": 8, "slash_by": "block", "slash_density": 0.1}

    def raw(name: str, steps: int, **parallel: int) -> dict[str, Any]:
        return raw_config(
            tmp_path / name, shards, train=options | {"steps": steps}, log={"every": 1}, pattern=thin,
            checkpoint={"every": 2}, parallel=parallel,
        )  # fmt: skip

    ((*whole,),) = pool.run(run_job, world=1, raw=raw("whole", 4))
    pool.run(run_job, world=1, raw=raw("killed", 3))
    shutil.rmtree(CheckpointStore(tmp_path / "killed").path(3))
    ((*resumed,), _) = pool.run(run_job, world=2, raw=raw("killed", 4, cp=2))
    for name in ("uncovered_run", "uncovered_run_far", "uncovered_run_by_distance"):
        assert [record[name] for record in resumed] == [record[name] for record in whole], name
    last = whole[-1]
    assert 0 < last["uncovered_run_by_distance"][1] < last["uncovered_by_distance"][1]


def test_norms_of_layers_in_two_dtypes_are_summed_in_fp32() -> None:
    """1,000 equal entries of bf16, whose own norm would be off by a part in 256, beside a vector in fp32."""
    layer = nn.ParameterList([nn.Parameter(torch.ones(1000).bfloat16()), nn.Parameter(torch.ones(3))])
    for parameter in layer:
        parameter.grad = torch.full_like(parameter, 1.5)
    (norm,) = layer_gradient_norms(nn.ModuleList([layer])).tolist()
    assert norm == pytest.approx(1.5 * math.sqrt(1003), rel=1e-6)
