"""Predicted memory of reading and answering, beside what torch allocates on CPU processes and on GPUs."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import MemoryCase, most_allocated
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from distributed import ProcessPool, Worker
from mtraining.bench.train.cases import SHAPES
from mtraining.generate import Generator, cache
from mtraining.layout import build_layout
from mtraining.pattern import Dense, VerticalSlash
from mtraining.predict.memory import GIB, Prediction
from mtraining.predict.reading import ReadingWork, predict_reading
from mtraining.predict.trace import META, ShapeKernels
from mtraining.ring import attention
from mtraining.train.mesh import build_mesh

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Case:
    """A model and its attention as `MemoryCase` has them, and what is read."""

    model: MemoryCase
    lengths: tuple[int, ...] = (4096,)
    new_tokens: int = 8
    scored: bool = False

    def predicted(self) -> Prediction:
        one = self.model
        return predict_reading(
            ReadingWork(
                one.model(META), (one.cp_outer, one.world // one.cp_outer), self.lengths, self.new_tokens,
                [one.build()], build_layout(one.layout, 16), one.dtype, self.scored,
            )
        )  # fmt: skip


# Each makes another part the largest: a layer's MLP, the cache of many layers and of several prompts of different
# lengths, the logits, the losses.
CASES = {
    "layer": Case(MemoryCase(mlp=1024)),
    "cache": Case(MemoryCase(layers=12, mlp=64, vocab=256), (1000, 800, 1000, 400), new_tokens=3),
    "windows": Case(
        MemoryCase(layers=12, mlp=64, vocab=256, window=100), (1000, 800, 1000, 400), new_tokens=3
    ),
    "losses": Case(MemoryCase(vocab=4096), scored=True),
    "alone": Case(MemoryCase(world=1), (2048,)),
    "dense": Case(MemoryCase(pattern="dense")),
    "hierarchical": Case(MemoryCase(world=4, cp_outer=2)),
    "fp32": Case(MemoryCase(dtype=torch.float32), (3000, 3001)),
    "nothing kept": Case(MemoryCase(layers=12), new_tokens=0),
    "logits": Case(MemoryCase(vocab=65536, layers=1, mlp=64, pattern="dense"), (64,) * 16, new_tokens=2),
}
FAST = ("layer", "cache", "windows", "losses")


@dataclass(frozen=True)
class Grid:
    cp: int
    cp_outer: int
    dp: int = 1


def no_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """A decode kernel that allocates what a GPU's does; the eager reference copies the whole cache."""
    return torch.zeros_like(q, dtype=torch.float32), q.new_zeros(q.shape[:2], dtype=torch.float32)


def measured(worker: Worker, case: Case) -> int:
    """Peak bytes that torch has allocated on this rank, parameters and all."""
    one = case.model
    mesh = build_mesh(Grid(one.world, one.cp_outer), "cpu")  # type: ignore[arg-type]
    dims = tuple(name for name in mesh.mesh_dim_names if name != "dp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "select_backend", lambda *args: ShapeKernels())
        patch.setattr(cache, "select_decode", lambda *args: no_attention)
        generator = Generator(
            one.model("cpu").to(one.dtype), mesh=mesh[dims] if one.world > 1 else None, pattern=one.build(),
            layout=build_layout(one.layout, 16), beyond_positions=True,
        )  # fmt: skip

        def work() -> object:
            prompts = [[1] * length for length in case.lengths]
            if case.scored:
                return generator.token_nll(prompts[0])
            if not case.new_tokens:
                return generator.prefill(prompts[0])
            return generator.generate(prompts, case.new_tokens, eos=())

        standing = sum(p.numel() * p.element_size() for p in generator.model.parameters())
        return standing + most_allocated(work)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST)]
)
def test_prediction_is_within_a_tenth_of_what_is_allocated(pool: ProcessPool, name: str) -> None:
    case = CASES[name]
    found = min(pool.run(measured, case.model.world, case=case))
    assert case.predicted().peak == pytest.approx(found, rel=0.10)


def test_cases_have_their_peaks_in_different_parts() -> None:
    largest = {}
    for name, case in CASES.items():
        parts = case.predicted().components
        largest[name] = max(parts, key=lambda part: parts[part])
    assert largest["layer"] == "working set of a layer" and largest["cache"] == "keys and values"
    assert largest["losses"] == "last layer's output, losses"
    assert CASES["logits"].predicted().moment == "in the logits"
    whole, some = (CASES[name].predicted().components["keys and values"] for name in ("cache", "windows"))
    # Every third layer has its whole prompt, and the others the part that their windows still reach.
    assert 0.33 < some / whole < 0.45
    assert "keys and values" not in CASES["nothing kept"].predicted().components


def committed() -> list[dict[str, str]]:
    """Peaks that PyTorch counted on GPUs, by benchmarks/prefill_decode.py."""
    rows = []
    for path in sorted(RESULTS.glob("prefill-decode-*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows += [row for row in csv.DictReader(file) if row["engine"] == "mtraining"]
    return rows


def test_prediction_is_within_a_tenth_of_what_gpus_took() -> None:
    rows = committed()
    assert {row["seq_len"] for row in rows} >= {"32768", "524288"}
    for row in rows:
        shape, length = SHAPES[row["model"]], int(row["seq_len"])
        with torch.device("meta"):
            model = Qwen2ForCausalLM(Qwen2Config(**shape.config_fields(length + 33, int(row["layers"]))))
        pattern, layout = (
            (VerticalSlash(slash_by="block", slash_density=0.035, probe_at="spread", probe=256), "striped")
            if row["attention"] == "sparse"
            else (Dense(), "zigzag")
        )
        ring = (1, int(row["gpus"]))
        work = ReadingWork(model, ring, [length], 33, [pattern], build_layout(layout), torch.bfloat16)
        assert predict_reading(work).peak / GIB == pytest.approx(float(row["peak_gib"]), rel=0.10), row


def test_what_is_predicted_adds_up_and_shares_out() -> None:
    one = Case(MemoryCase(world=1, layers=8))
    two = replace(one, model=replace(one.model, world=2))
    alone, shared = one.predicted(), two.predicted()
    assert alone.peak == sum(alone.components.values()) == max(alone.moments.values())
    # Two vectors of 32 numbers in bf16 for each token, layer and kv head.
    room = 4096 + 8 - 1
    assert alone.components["keys and values"] == 2 * 32 * 2 * room * 8 * 2
    assert shared.components["keys and values"] == pytest.approx(
        alone.components["keys and values"] / 2, rel=0.01
    )
    assert shared.components["parameters"] == alone.components["parameters"]
    assert shared.components["working set of a layer"] < 0.7 * alone.components["working set of a layer"]
