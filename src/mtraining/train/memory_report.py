"""The memory of a configured run: predicted from its options, and told beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtraining.layout import build_layout
from mtraining.model import build_model
from mtraining.predict.memory import Prediction, Unpredictable, Workload, predict
from mtraining.sizes import size_text
from mtraining.train.config import Config

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


class MemoryLog:
    """Tells what a run's memory is predicted to be as it begins, and the measured peak beside it after two steps, when
    the optimizer has its state. Measured on GPUs only: elsewhere nobody counts tensors apart from the process."""

    def __init__(
        self, config: Config, hf_model: Any, device: torch.device, tell: Callable[[str], None]
    ) -> None:
        self._device, self._tell, self._steps = device, tell, 0
        self._prediction: Prediction | None = None
        try:
            self._prediction = predict_config(config, hf_model)
            tell(render(self._prediction))
        except Unpredictable as reason:
            tell(str(reason))

    def step_done(self) -> None:
        """After every step."""
        self._steps += 1
        if self._steps == 2 and self._device.type == "cuda":
            self._tell(render_measured(self._prediction, torch.cuda.max_memory_allocated(self._device)))


def render(prediction: Prediction) -> str:
    """One line for a log: the components of the peak."""
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in prediction.components.items())
    return f"memory a GPU, predicted: {size_text(prediction.peak)} {prediction.moment} ({parts})"


def render_measured(prediction: Prediction | None, measured: int) -> str:
    """One line for a log: the measured peak beside the predicted one, if there is one."""
    beside = f", {measured / prediction.peak:.2f} of what was predicted" if prediction else ""
    return f"memory a GPU, measured: {size_text(measured)}{beside}"
