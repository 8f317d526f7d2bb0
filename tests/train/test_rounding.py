"""Updates that are rounded away: told at the start, with the option that cures it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import raw_config

import mtraining.train.loop as loop
from distributed import ProcessPool, Worker
from mtraining.train.config import parse_config
from mtraining.train.optim import updates_lost


def weights(*values: float, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def test_lost_is_what_adding_and_taking_away_does_not_change() -> None:
    """bfloat16 has 8 bits: beside 1 lie 1 - 2**-8 and 1 + 2**-7, so half of 2**-8 is the most that is lost below it."""
    held = [weights(1.0, 1.0), weights(0.0, 1e-3, 0.02, 1.0)]
    assert updates_lost(held, 2e-5).tolist() == [[2, 2], [2, 4]]
    assert updates_lost([weights(1.0)], 2**-9 * 0.99).tolist() == [[1, 1]]
    assert updates_lost([weights(1.0)], 2**-9 * 1.01).tolist() == [[0, 1]]
    assert updates_lost([weights(1.0, 0.02, dtype=torch.float32)], 2e-5).tolist() == [[0, 2]]
    assert updates_lost([weights(1.0, dtype=torch.float32)], 1e-9).tolist() == [[1, 1]]


def started(run: Path, shards: Path, dtype: str, **train: Any) -> dict[str, Any]:
    raw = raw_config(run, shards, train={"steps": 2, "warmup_steps": 0, **train}, checkpoint={"every": 0})
    raw["model"]["dtype"] = dtype
    return raw


def warning_of(out: str) -> str | None:
    return next((line for line in out.splitlines() if "is rounded away" in line), None)


def test_bfloat16_master_weights_at_a_usual_rate(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """320 weights of norms, five of 64, stay what they are; the warning says so, and is right."""
    models: list[Any] = []
    build = loop.parallel_model

    def keep(*args: Any) -> Any:
        models.append(build(*args))
        return models[-1]

    monkeypatch.setattr(loop, "parallel_model", keep)
    raw = started(tmp_path / "run", shards, "bfloat16", lr=2e-5)
    raw["model"]["config"]["attention_bias"] = False
    raw["model"]["config"]["model_type"] = "llama"
    loop.train(parse_config(raw))
    told = warning_of(capsys.readouterr().out)
    assert told is not None
    assert told.startswith(
        "warning: model.dtype=bfloat16 holds weights so coarsely that an update of train.lr=2e-05 is"
    )
    assert "in 320 of the 320 of norms and biases" in told
    assert "set model.dtype=float32" in told
    norms = [parameter for parameter in models[0].parameters() if parameter.ndim == 1]
    assert sum(norm.numel() for norm in norms) == 320
    assert all(bool((norm == 1).all()) for norm in norms)


@pytest.mark.parametrize(("dtype", "lr", "warned"), [("float32", 2e-5, False), ("float32", 1e-9, True)])
def test_float32_needs_no_warning_but_at_rates_without_effect(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], dtype: str, lr: float, warned: bool
) -> None:
    loop.train(parse_config(started(tmp_path / "run", shards, dtype, lr=lr)))
    told = warning_of(capsys.readouterr().out)
    assert (told is not None) == warned
    assert told is None or told.endswith("they would hardly learn; use a larger train.lr.")


def warned_job(worker: Worker, raw: dict[str, Any]) -> str | None:
    original, told = loop.rounding_warning, []
    loop.rounding_warning = lambda *args: told.append(original(*args))
    try:
        loop.train(parse_config(raw))
    finally:
        loop.rounding_warning = original
    return told[0]


def test_ranks_count_together(tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    """Weights that two ranks share are counted once."""
    sentences = []
    for world in (1, 2):
        raw = started(tmp_path / str(world), shards, "bfloat16", lr=2e-5, steps=1)
        raw["parallel"] = {"cp": world}
        sentences += pool.run(warned_job, world=world, raw=raw)
    assert sentences[0] is not None and "of the 576 of norms and biases" in sentences[0]
    assert sentences == sentences[:1] * 3
