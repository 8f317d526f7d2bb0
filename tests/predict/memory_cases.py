"""A real step on CPU processes whose allocations are counted, and what is predicted for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distributed import Worker
from mtraining.bench.train.model import Optimisation
from mtraining.layout import build_layout
from mtraining.model import LoraOptions, parallelize
from mtraining.model.adapters import open_adapter
from mtraining.model.lora import add_lora
from mtraining.model.recompute import LayerPolicy
from mtraining.pattern import Pattern, build_pattern
from mtraining.predict.memory import Prediction, Workload, predict
from mtraining.predict.trace import META, ShapeKernels
from mtraining.ring import attention
from mtraining.train.mesh import Process, build_mesh
from mtraining.train.optim import build_optimizer
from mtraining.train.step import Stepper


@dataclass(frozen=True)
class Grid:
    dp: int
    cp: int
    cp_outer: int = 1


@dataclass(frozen=True)
class MemoryCase:
    """Sizes at which allocations of 16 bytes and Python's own do not matter."""

    seq_len: int = 4096
    layers: int = 4
    hidden: int = 128
    mlp: int = 512
    vocab: int = 1024
    recompute: str | tuple[LayerPolicy, ...] = "full"
    pattern: str = "toeplitz_random"
    world: int = 2
    cp_outer: int = 1
    dp: int = 1
    accumulation: int = 1
    batch: int = 1
    tied: bool = True
    loss_chunk: int = 512
    dtype: torch.dtype = torch.bfloat16
    experts: int = 0
    cap: float | None = None
    sinks: bool = False
    lora: int = 0
    window: int | None = None
    optimizer_state: str = "full"

    def model(self, device: torch.device | str) -> Any:
        sizes = {
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": self.seq_len, "tie_word_embeddings": self.tied,
        }  # fmt: skip
        with torch.device(device):
            if self.experts:
                return MixtralForCausalLM(
                    MixtralConfig(**sizes, num_local_experts=self.experts, sliding_window=None)
                )
            if self.sinks:
                full = {"head_dim": self.hidden // 4, "layer_types": ["full_attention"] * self.layers}
                return GptOssForCausalLM(GptOssConfig(**sizes, **full, num_local_experts=4))
            if self.cap is not None:
                return NanoChatForCausalLM(NanoChatConfig(**sizes, final_logit_softcapping=self.cap))
            kinds = {
                "use_sliding_window": self.window is not None, "sliding_window": self.window,
                "layer_types": ["full_attention" if self.full(n) else "sliding_attention" for n in range(self.layers)],
            }  # fmt: skip
            model = Qwen2ForCausalLM(Qwen2Config(**sizes, **kinds))
            if not self.lora:
                return model
            return open_adapter(add_lora(model, LoraOptions(r=self.lora, also_train=("norm",)), seed=0))[0]

    def full(self, layer: int) -> bool:
        """Whether the layer has no window: without any, every one; else every third."""
        return self.window is None or layer % 3 == 2

    def build(self) -> Pattern:
        options = {"density": 0.3, "columns": 256, "window": 2} if self.pattern == "toeplitz_random" else {}
        return build_pattern(self.pattern, block_size=16, **options)

    @property
    def layout(self) -> str:
        return "zigzag" if self.pattern == "dense" else "striped"

    def work(self) -> Workload:
        cp = self.world // self.dp
        return Workload(
            self.model(META), self.world, (self.cp_outer, cp // self.cp_outer), self.seq_len, self.batch,
            self.accumulation, [self.build()], build_layout(self.layout, 16), self.recompute, False, "none",
            self.dtype, self.loss_chunk, optimizer_state=self.optimizer_state,
        )  # fmt: skip

    def predicted(self) -> Prediction:
        return predict(self.work())


def measured(worker: Worker, case: MemoryCase) -> int:
    """Peak bytes that torch has allocated in the second step, this rank's, parameters and all."""
    cpu = torch.device("cpu")
    cp = case.world // case.dp
    mesh = build_mesh(Grid(case.dp, cp, case.cp_outer), "cpu")  # type: ignore[arg-type]
    dims = tuple(name for name in mesh.mesh_dim_names if name != "dp")
    from mtraining.ring import Ring

    process = Process(cpu, mesh, worker.rank, worker.world, worker.rank // cp, Ring.over(mesh[dims]).rank)
    layout = build_layout(case.layout, 16)
    with pytest.MonkeyPatch.context() as patch:
        # The eager reference works in masks and copies that no GPU kernel has.
        patch.setattr(attention, "select_backend", lambda *args: ShapeKernels())
        model = parallelize(
            case.model("cpu"), mesh, pattern=case.build(), layout=layout, recompute=case.recompute,  # type: ignore[arg-type]
            param_dtype=case.dtype, loss_chunk=case.loss_chunk,
        )  # fmt: skip
        options: Any = Optimisation(case.seq_len, optimizer_state=case.optimizer_state)
        stepper = Stepper(model, build_optimizer(model, options, cpu), options, process, case.accumulation)
        whole = {
            "input_ids": torch.ones(case.batch, case.seq_len, dtype=torch.int64),
            "labels": torch.ones(case.batch, case.seq_len, dtype=torch.int64),
            "position_ids": torch.arange(case.seq_len).expand(case.batch, -1),
        }
        batch = {name: layout.shard(x, process.cp_rank, cp).contiguous() for name, x in whole.items()}
        stepper.run(iter([batch] * case.accumulation), 0)
        standing = sum(
            x.numel() * x.element_size()
            for p in model.parameters()
            for x in (p.to_local(), *(s.to_local() for s in stepper._optimizer.state[p].values() if s.ndim))
        )
        return standing + most_allocated(lambda: stepper.run(iter([batch] * case.accumulation), 1))


def most_allocated(work: Callable[[], object]) -> int:
    """Most bytes that torch had allocated on the CPU at a time while ``work`` ran, beside what was there before."""
    # PyTorch 2.11's profiler warns that it keeps the events of one cycle; there is one.
    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)
    with quiet, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    changes = [event.nbytes() for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest
