"""A second start on GPUs compiles nothing, and no step after the first does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtraining.data import PrepareOptions, prepare
from mtraining.train.about import ABOUT
from processes import run_command

pytestmark = pytest.mark.gpu

SEQ_LEN = 8192
MODEL = {
    "model_type": "qwen2", "vocab_size": 260, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SPARSE = {
    "name": "vertical_slash", "top_p": 0.9, "max_columns": 512, "max_slashes": 64, "slash_by": "block",
    "slash_density": 0.2, "probe_at": "spread",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "sparse": {"pattern": SPARSE},
    # Columns change in number from step to step.
    "shrinking budgets": {"pattern": SPARSE | {"anneal": {"widen": 3.0, "widen_steps": 3}}},
    "packed documents": {"pattern": SPARSE, "data": {"mode": "packed"}},
    "compiled layers": {"pattern": SPARSE, "train": {"fused": "compile"}},
    "xattention": {"pattern": {"name": "xattention"}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents, of which the first two are whole sequences and more."""
    folder = tmp_path_factory.mktemp("text")
    for number, length in enumerate((9000, 20000, 3000, 700, 4000, 2500, 1200, 5000)):
        text = " ".join(str((number + 2) * count) for count in range(length))[:length]
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    prepare(PrepareOptions(sources=(str(folder),), out=folder / "shards", kind="text"), progress=False)
    return folder / "shards"


def started(folder: Path, shards: Path, case: str, name: str, ranks: int) -> tuple[dict[str, Any], str]:
    """What about.json says of a run's start, and what the run printed."""
    given = CASES[case]
    raw = {
        "output": str(folder / name),
        "model": {"init": "random", "config": MODEL},
        "data": {"path": str(shards), "mode": "concat"} | given.get("data", {}),
        "pattern": given["pattern"],
        "parallel": {"cp": ranks},
        "train": {"seq_len": SEQ_LEN, "steps": 4, "dtype": "bf16", "lr": 1e-4} | given.get("train", {}),
        "checkpoint": {"every": 0, "export": False},
        "log": {"every": 2, "trackers": []},
        "distributed": {"device": "cuda"},
    }
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [sys.executable, "-m", "mtraining.cli", "train", str(recipe)]
    if ranks > 1:
        command.append(f"--nproc={ranks}")
    done = run_command(command, env=environment, limit=500)
    return json.loads((folder / name / ABOUT).read_text(encoding="utf-8"))["start"], done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_second_start_compiles_nothing(tmp_path: Path, shards: Path, case: str, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    first, told = started(tmp_path, shards, case, "first", ranks)
    assert first["kernels_compiled"] > 5
    assert "compiled by step" not in told
    second, told = started(tmp_path, shards, case, "second", ranks)
    assert second["kernels_compiled"] == 0
    assert second["graphs_compiled"] == 0
    # A rank may find in the first start already what another one has compiled.
    for kind in ("kernels", "graphs"):
        assert second[f"{kind}_from_cache"] == first[f"{kind}_compiled"] + first[f"{kind}_from_cache"]
    assert (first["graphs_compiled"] > 0) == (case == "compiled layers")
    assert "compiled by step" not in told
    assert second["kernel_seconds"] < first["kernel_seconds"]
