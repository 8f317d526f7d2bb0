"""The model and the tokens of a benchmark: random, made where they are used, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mtraining.bench.train.cases import Shape, TrainCase
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, parallelize
from mtraining.train.mesh import Process, build_mesh
from mtraining.train.optim import build_optimizer
from mtraining.train.step import Batch, Stepper


@dataclass(frozen=True)
class Optimisation:
    """What a step reads of the trainer's options, at the trainer's defaults."""

    seq_len: int
    steps: int = 1_000_000
    lr: float = 2e-5
    min_lr: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay: str = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer_state: str = "full"


@dataclass(frozen=True)
class Grid:
    """A process grid: ``dp`` sequences, each over ``cp`` ranks."""

    cp: int
    cp_outer: int
    dp: int = 1


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as one trains; fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def process_for(case: TrainCase, device: torch.device, rank: int, world: int, dp: int = 1) -> Process:
    """``dp`` sequences at a time, the ranks of each as the case's ring. Collective; meshes are made once.

    Raises:
        UserError: a ring of another number of ranks.
    """
    from mtraining.ring import Ring

    cp = world // dp
    grid = Grid(cp, case.outer(cp), dp)
    if (grid, device.type) not in _meshes:
        _meshes[grid, device.type] = build_mesh(cast(Any, grid), device.type)
    mesh = _meshes[grid, device.type]
    dims = tuple(name for name in mesh.mesh_dim_names or () if name != "dp")
    return Process(device, mesh, rank, world, dp_rank=rank // cp, cp_rank=Ring.over(mesh[dims]).rank)


_meshes: dict[tuple[Grid, str], Any] = {}


def build_model(shape: Shape, seq_len: int, layers: int, device: torch.device, **config: Any) -> Any:
    """A transformers model with random fp32 weights on the device; ``config`` replaces fields."""
    options = Qwen2Config(**{**shape.config_fields(seq_len, layers), **config})
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(options)


def parallel(case: TrainCase, model: Any, process: Process, dtype: torch.dtype | None = None) -> ParallelLM:
    """The model under the case's settings, by the path that training takes; ``dtype`` is to compute in, by default
    that of the device."""
    recompute, offload = case.keeps
    return parallelize(
        model,
        process.mesh,
        pattern=case.pattern(),
        layout=build_layout(case.layout, case.shape.block_size),
        kernel=case.kernel,
        recompute=cast(Any, recompute),
        param_dtype=compute_dtype(process.device) if dtype is None else dtype,
        fused=cast(Any, case.fused),
        float8=cast(Any, case.float8),
        offload=offload,
    )


def stepper(case: TrainCase, model: ParallelLM, process: Process) -> Stepper:
    """The trainer's own step: forward, backward, norm, clipping, AdamW."""
    settings = cast(Any, Optimisation(case.seq_len, optimizer_state=case.optimizer_state))
    return Stepper(model, build_optimizer(model, settings, process.device), settings, process, accumulation=1)


def random_sequences(vocab: int, seq_len: int, count: int = 1) -> Tensor:
    """int64 (count, seq_len + 1), the same everywhere."""
    return torch.randint(vocab, (count, seq_len + 1), generator=torch.Generator().manual_seed(1))


def batches(case: TrainCase, sequences: Tensor, process: Process, dp: int = 1) -> Iterator[Batch]:
    """This rank's share of these sequences, over and over, in pinned memory where there is a GPU."""
    layout = build_layout(case.layout, case.shape.block_size)
    rows = sequences.chunk(dp)[process.dp_rank]
    positions = torch.arange(rows.shape[1] - 1).expand(len(rows), -1)
    whole = {"input_ids": rows[:, :-1], "labels": rows[:, 1:], "position_ids": positions}
    cp = process.world // dp
    batch = {name: layout.shard(x, process.cp_rank, cp).contiguous() for name, x in whole.items()}
    if process.device.type == "cuda":
        batch = {name: x.pin_memory() for name, x in batch.items()}
    while True:
        yield batch
