"""Predicted memory of an evaluation while training, beside what torch allocates, and beside a step's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import Grid, MemoryCase, most_allocated
from typer.testing import CliRunner

from distributed import ProcessPool, Worker
from mtraining.bench.train.model import Optimisation
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.generate import Generator
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.predict.evaluation import predict_evaluation
from mtraining.predict.memory import Prediction
from mtraining.predict.trace import ShapeKernels
from mtraining.ring import attention
from mtraining.train.mesh import build_mesh
from mtraining.train.optim import build_optimizer

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen2.5-3b-512k.yaml"


def predicted(case: MemoryCase, length: int, new_tokens: int = 0) -> Prediction:
    return predict_evaluation(case.work(), [case.build()], length, new_tokens)


def measured(worker: Worker, case: MemoryCase, length: int) -> int:
    """Peak bytes that torch has allocated on this rank while held-out text is read, and what training has there."""
    cpu = torch.device("cpu")
    mesh = build_mesh(Grid(case.dp, case.world // case.dp, case.cp_outer), "cpu")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        # The eager reference works in masks and copies that no GPU kernel has.
        patch.setattr(attention, "select_backend", lambda *args: ShapeKernels())
        model = parallelize(
            case.model("cpu"), mesh, pattern=case.build(), layout=build_layout(case.layout, 16),
            recompute=case.recompute, param_dtype=case.dtype, loss_chunk=case.loss_chunk,
        )  # fmt: skip
        options: Any = Optimisation(case.seq_len)
        build_optimizer(model, options, cpu)
        own = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
        generator = Generator(model)
        return 3 * own + most_allocated(lambda: generator.token_nll([1] * length))


@pytest.mark.parametrize(
    "case",
    [
        MemoryCase(mlp=1024),
        MemoryCase(vocab=4096),
        pytest.param(MemoryCase(world=4, dp=2), marks=pytest.mark.slow),
        pytest.param(MemoryCase(world=1, tied=False), marks=pytest.mark.slow),
        pytest.param(MemoryCase(world=4, cp_outer=2, pattern="dense"), marks=pytest.mark.slow),
    ],
    ids=["layer", "losses", "replicas", "alone", "dense"],
)
def test_prediction_is_within_a_tenth_of_what_is_allocated(pool: ProcessPool, case: MemoryCase) -> None:
    found = min(pool.run(measured, case.world, case=case, length=case.seq_len))
    assert predicted(case, case.seq_len).peak == pytest.approx(found, rel=0.10)


@pytest.mark.parametrize("recompute", ["full", "keep_attention", "none"])
def test_held_out_text_of_the_trained_length_takes_no_more_than_a_step(recompute: str) -> None:
    for case in (
        MemoryCase(),
        MemoryCase(vocab=65536),
        MemoryCase(pattern="dense", layers=1),
        MemoryCase(mlp=2048),
    ):
        case = replace(case, recompute=recompute)
        step = case.predicted()
        assert predicted(case, case.seq_len).peak <= step.peak
        assert predicted(case, case.seq_len // 2).peak < step.peak


def test_components_add_up_and_a_cache_takes_more() -> None:
    case = MemoryCase(layers=12, mlp=64)
    loss, needle = predicted(case, 4096), predicted(case, 4096, 64)
    for found in (loss, needle):
        assert found.peak == pytest.approx(max(found.moments.values()))
        assert {
            "parameters (shard)",
            "optimizer state (shard)",
            "gathered parameters",
        } <= found.components.keys()
        assert "parameters" not in found.components
    assert "keys and values" not in loss.components and needle.components["keys and values"] > 0
    assert predicted(case, 8192).peak > loss.peak


def dry_run(*options: str) -> Any:
    sets = [word for option in options[1:] for word in ("--set", option)]
    return CliRunner().invoke(app, ["train", str(RECIPE), "--dry-run", "--memory-gib", options[0], *sets])


def test_dry_run_tells_an_evaluations_memory_and_refuses_what_cannot_fit() -> None:
    told = dry_run("139", "evaluate.data=unseen", "evaluate.every=10", "evaluate.attention=[train,dense]")
    assert told.exit_code == 0, told.output
    assert "evaluation: held-out loss, " in " ".join(told.output.split())
    needle = dry_run(
        "16", "evaluate.suites=[needle]", "evaluate.every=10", "evaluate.lengths=[4194304]", "model.rope.factor=128"
    )  # fmt: skip
    assert isinstance(needle.exception, UserError)
    assert str(needle.exception).startswith("an evaluation of 4194304 tokens needs ")
    assert str(needle.exception).endswith("more GPUs (parallel.cp), or shorter evaluate.lengths.")
    beyond = dry_run("139", "evaluate.data=unseen", "evaluate.every=10", "evaluate.lengths=[4194304]")
    assert isinstance(beyond.exception, UserError)
    assert str(beyond.exception).startswith("evaluate.lengths: 4194304 tokens are beyond the ")
