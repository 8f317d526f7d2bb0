"""Low-rank adapters on a GPU: liger's layers learn as eager ones, and a step in bf16 moves what is trained alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from test_step_gpu import FUSED_TOLERANCE, SEQ_LEN, VOCAB, Options, batches
from torch.distributed.tensor import DTensor

from library_warnings import COMPILE
from mtraining.layout import build_layout
from mtraining.model import LoraOptions, ModelOptions, ParallelLM, build_model, parallelize
from mtraining.pattern import VerticalSlash
from mtraining.train.mesh import Process
from mtraining.train.optim import build_optimizer
from mtraining.train.step import Stepper, StepResult

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(*COMPILE),
]

SIZES = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": SEQ_LEN,
}  # fmt: skip


def make(process: Process, **options: Any) -> ParallelLM:
    """Frozen weights in bf16, trained ones in fp32."""
    lora = LoraOptions(r=8, also_train=("embed_tokens", "norm"))
    model, _ = build_model(ModelOptions(config=SIZES, dtype="bfloat16", lora=lora), SEQ_LEN)
    pattern = VerticalSlash(top_p=None, top_k_columns=300, slash_by="block", slash_density=0.2)
    return parallelize(
        model,
        process.mesh,
        pattern=pattern,
        layout=build_layout("striped"),
        param_dtype=torch.bfloat16,
        **options,
    )


def steps(process: Process, **options: Any) -> tuple[list[StepResult], ParallelLM]:
    model, settings = make(process, **options), cast(Any, Options())
    optimizer = build_optimizer(model, settings, process.device)
    stepper = Stepper(model, optimizer, settings, process, accumulation=1)
    data: Iterator[Any] = batches()
    return [stepper.run(data, step) for step in range(3)], model


def test_liger_learns_the_same(process: Process) -> None:
    pytest.importorskip("liger_kernel")
    expected, _ = steps(process, recompute="full")
    found, _ = steps(process, recompute="full", fused="liger")
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        loss, norm = FUSED_TOLERANCE[min(step, 1)]
        assert other.loss == pytest.approx(one.loss, rel=loss, abs=0), step
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=norm, abs=0), step


def test_steps_move_what_is_trained_alone(process: Process) -> None:
    before = {name: whole(p).clone() for name, p in make(process).named_parameters()}
    _, model = steps(process)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), before[name]) is not parameter.requires_grad, name


def whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
