"""The memory of a configured run: predicted from its options, and told beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mtraining.layout import build_layout
from mtraining.model import build_model
from mtraining.model.adapters import open_adapter
from mtraining.model.recompute import LayerPolicy
from mtraining.pattern import Dense
from mtraining.predict.evaluation import predict_evaluation
from mtraining.predict.memory import Prediction, Unpredictable, Workload, predict
from mtraining.sizes import size_text
from mtraining.train.config import Config
from mtraining.train.evaluation import check_positions, evaluation_pattern
from mtraining.train.mesh import Process
from mtraining.train.recompute import choose_together

_ANSWER = 64  # tokens that answer a question of a suite at most; they take little beside a prompt


def predict_config(
    config: Config, hf_model: Any = None, policies: Sequence[LayerPolicy] | None = None
) -> Prediction:
    """What a step of this configuration takes on each GPU.

    Args:
        hf_model: the run's model, if it is there; otherwise its shapes are made on the meta device.
        policies: what each layer keeps, where ``recompute: auto`` has chosen that.
    """
    work = workload(config, hf_model)
    return predict(work if policies is None else replace(work, recompute=policies, offload=False))


def predict_evaluations(config: Config, hf_model: Any = None) -> tuple[str, Prediction] | None:
    """What is evaluated that takes most of a GPU, in words, and how much that is; None where nothing is evaluated."""
    settings = config.evaluate
    if settings.every is None:
        return None
    work = workload(config, hf_model)
    check_positions(config, work.hf_model.config)
    asked = {"held-out loss": 0} if settings.data is not None else {}
    asked |= dict.fromkeys(settings.suites, _ANSWER)
    longest = config.evaluate_lengths[-1]
    found = {}
    for attention in settings.attention:
        pattern = evaluation_pattern(config, attention)
        patterns = work.patterns if pattern is None else [pattern]
        for what, new_tokens in asked.items():
            prediction = predict_evaluation(work, patterns, longest, new_tokens)
            found[f"{what}, {attention}, {longest} tokens"] = prediction
    most = max(found, key=lambda what: found[what].peak)
    return most, found[most]


def workload(config: Config, hf_model: Any = None) -> Workload:
    """One step of this configuration, of a model that is given or made on the meta device."""
    if hf_model is None:
        hf_model, _ = open_adapter(build_model(config.model, config.train.seq_len, device="meta")[0])
    layout, parallel, train = (
        build_layout(config.layout.name, config.layout.unit),
        config.parallel,
        config.train,
    )
    patterns = [config.pattern.build(), *config.patterns_by_layer.values()]
    for pattern in patterns:
        layout.check(train.seq_len, parallel.cp, pattern.block_size)
    anneal = config.pattern.anneal.build()
    if anneal.widen_steps:  # the first step has the largest budgets
        patterns = [anneal.pattern(pattern, 1) for pattern in patterns]
    if anneal.dense_first or anneal.dense_every:
        patterns.append(Dense(block_size=patterns[0].block_size))
    return Workload(
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
        float8=train.float8,
        optimizer_state=train.optimizer_state,
        compute=train.compute,
    )


class MemoryLog:
    """Tells what a run's memory is predicted to be as it begins, and the measured peak beside it after two steps, when
    the optimizer has its state. Measured on GPUs only: elsewhere nobody counts tensors apart from the process."""

    def __init__(
        self,
        config: Config,
        hf_model: Any,
        device: torch.device,
        tell: Callable[[str], None],
        policies: Sequence[LayerPolicy] | None = None,
    ) -> None:
        self._device, self._tell, self._steps = device, tell, 0
        self._shortages: int | None = None
        self._told = False
        self.prediction: Prediction | None = None
        try:
            self.prediction = predict_config(config, hf_model, policies)
            tell(render(self.prediction))
            evaluation = predict_evaluations(config, hf_model)
            if evaluation is not None:
                tell(f"{render(evaluation[1])}: {evaluation[0]}")
        except Unpredictable as reason:
            tell(str(reason))

    def step_done(self, step: int, found: Mapping[str, int]) -> None:
        """After every step.

        Args:
            step: counts from 1.
            found: ``memory_shortages`` so far, where they were counted (mtraining.model.allocator).
        """
        self._steps += 1
        self._watch(step, found.get("memory_shortages"))
        if self._steps == 2 and self._device.type == "cuda":
            self._tell(render_measured(self.prediction, torch.cuda.max_memory_allocated(self._device)))

    def _watch(self, step: int, shortages: int | None) -> None:
        """Say once that steps run short of memory. What the first steps ran short of says nothing of later ones."""
        if shortages is None:
            return
        more = 0 if self._shortages is None else shortages - self._shortages
        self._shortages = shortages
        if more and not self._told:
            self._told = True
            self._tell(
                f"memory ran short {more} times up to step {step}: PyTorch found no room on a GPU, waited for its work "
                "and took memory anew, so steps are slower than they need be. Keep less (train.recompute), use more "
                "GPUs, or free their memory of other processes."
            )


def render(prediction: Prediction) -> str:
    """One line for a log: the components of the peak."""
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in prediction.components.items())
    return f"memory a GPU, predicted: {size_text(prediction.peak)} {prediction.moment} ({parts})"


def render_measured(prediction: Prediction | None, measured: int) -> str:
    """One line for a log: the measured peak beside the predicted one, if there is one."""
    beside = f", {measured / prediction.peak:.2f} of what was predicted" if prediction else ""
    return f"memory a GPU, measured: {size_text(measured)}{beside}"


def settle_recompute(
    config: Config, process: Process, tell: Callable[[str], None]
) -> tuple[str | Sequence[LayerPolicy], bool]:
    """(recompute, offload) for `mtraining.model.parallelize`, before the weights are loaded. Collective.

    Raises:
        UserError: nothing fits, or the model's memory cannot be predicted.
    """
    if config.train.recompute != "auto":
        return config.train.recompute, config.train.offload
    choice, line = choose_together(workload(config), process.device, process.gather_objects)
    tell(line)
    return ("none" if choice is None else choice.policies), False
