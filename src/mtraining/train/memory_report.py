"""The memory of a configured run: predicted from its options, and told beside what was measured."""

from __future__ import annotations

from typing import Any

import torch

from mtraining.layout import build_layout
from mtraining.model import build_model
from mtraining.train.config import Config
from mtraining.train.memory import GIB, Prediction, Workload, predict

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def predict_config(config: Config, hf_model: Any = None) -> Prediction:
    """What a step of this configuration takes on each GPU.

    Args:
        hf_model: the run's model, if it is there; otherwise its shapes are made on the meta device.
    """
    if hf_model is None:
        hf_model, _ = build_model(config.model, config.train.seq_len, device="meta")
    layout, parallel, train = (
        build_layout(config.layout.name, config.layout.unit),
        config.parallel,
        config.train,
    )
    patterns = [config.pattern.build(), *config.patterns_by_layer.values()]
    for pattern in patterns:
        layout.check(train.seq_len, parallel.cp, pattern.block_size)
    return predict(
        Workload(
            hf_model,
            world=parallel.world,
            ring=(parallel.cp_outer, parallel.cp // parallel.cp_outer),
            seq_len=train.seq_len,
            batch=train.micro_batch_size,
            accumulation=config.accumulation,
            patterns=patterns,
            layout=layout,
            recompute=train.recompute,
            offload=train.offload,
            fused=train.fused,
            loss_chunk=train.loss_chunk,
            compute=COMPUTE[train.dtype],
        )
    )


def render(prediction: Prediction) -> str:
    """One line for a log: the components of the peak."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in prediction.components.items())
    return f"memory a GPU, predicted: {prediction.peak / GIB:.2f} GiB {prediction.moment} ({parts})"


def render_measured(prediction: Prediction, measured: int) -> str:
    """One line for a log: the measured peak beside the predicted one."""
    return f"memory a GPU, measured: {measured / GIB:.2f} GiB, {measured / prediction.peak:.2f} of what was predicted"
