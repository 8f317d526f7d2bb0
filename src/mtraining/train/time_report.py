"""The seconds of a run's step: predicted from the GPU's measured rates, and told beside what was measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import device_name
from mtraining.layout import build_layout
from mtraining.model.float8_checks import EMULATIONS
from mtraining.model.recompute import LayerPolicy
from mtraining.predict.measured import Rates, rates_of_device
from mtraining.predict.ring import Network
from mtraining.predict.step_time import ModelShape, Setting, attention_passes, one_machine, step_time
from mtraining.predict.work import Index, LayerWork
from mtraining.ring import AttentionStats
from mtraining.train.config import Config

APART = 0.2  # share from which on a run says that prediction and measurement differ
_COUNTED = (2, 3)  # steps of this process whose faster one is compared: the first compiles and allocates


class TimeLog:
    """Tells what a step should take once the first one has shown what attention computes, and after the third what it
    takes. On GPUs only, and where their rates were measured; elsewhere it says so once, on a CPU nothing."""

    def __init__(
        self,
        config: Config,
        hf_model: Any,
        device: torch.device,
        tell: Callable[[str], None],
        policies: Sequence[LayerPolicy] | None = None,
    ) -> None:
        self._config, self._model, self._device, self._tell = config, hf_model, device, tell
        self._policies = policies
        self._steps, self._measured = 0, float("inf")
        self._predicted: float | None = None
        # Rates of products in float8 are not measured.
        self._caveat = " without what float8 gains" if config.train.float8 in EMULATIONS else ""
        self._rates: Rates | None = None
        if device.type != "cuda":
            return
        name = device_name(device)
        try:
            self._rates = rates_of_device(name)
        except UserError as damaged:
            tell(str(damaged))
            return
        if self._rates is None:
            tell(
                f"seconds a step: not predicted, for no rates of {name} are known; mtraining bench rates measures them"
            )

    def step_done(self, seconds: float, layers: Sequence[AttentionStats]) -> None:
        """After every step.

        Args:
            seconds: that it took.
            layers: its attention where it was observed, else nothing.
        """
        if self._rates is None:
            return
        self._steps += 1
        if layers and self._predicted is None and self._steps < max(_COUNTED):
            try:
                self._predicted = predict_seconds(
                    self._config, self._model, layers, self._rates, policies=self._policies
                )
                self._tell(f"seconds a step, predicted: {self._predicted:.2f}{self._caveat}")
            except UserError as reason:
                self._rates = None
                self._tell(f"seconds a step: not predicted: {reason}")
        if self._steps in _COUNTED:
            self._measured = min(self._measured, seconds)
        if self._steps == max(_COUNTED) and self._predicted is not None:
            self._tell(render_seconds(self._predicted, self._measured, self._caveat))


def render_seconds(predicted: float, measured: float, caveat: str = "") -> str:
    """One line for a log: the measured seconds beside the predicted ones, and whether they are far apart.

    Args:
        caveat: what the prediction leaves out; a step that is faster is then no surprise.
    """
    line = (
        f"seconds a step, measured: {measured:.2f}, {measured / predicted:.2f} of what was predicted{caveat}"
    )
    if abs(measured / predicted - 1) <= APART or (caveat and measured < predicted):
        return line
    return (
        f"{line}: more than {APART:.0%} apart. Look at ring_exposed_fraction in metrics.jsonl (slow links), at "
        "data.workers and at other programs on these GPUs; mtraining bench rates measures the rates of this machine"
    )


def predict_seconds(
    config: Config,
    hf_model: Any,
    layers: Sequence[AttentionStats],
    rates: Rates,
    node_size: int | None = None,
    policies: Sequence[LayerPolicy] | None = None,
) -> float:
    """Seconds of a step of this configuration, with the indices that ``layers`` had.

    Args:
        node_size: GPUs of a machine; None asks the launcher's LOCAL_WORLD_SIZE.
        policies: what each layer keeps, where ``recompute: auto`` has chosen that.

    Raises:
        UserError: something that was not measured, or a model that cannot be timed from shapes.
    """
    parallel, train = config.parallel, config.train
    if node_size is None:
        node_size = int(os.environ.get("LOCAL_WORLD_SIZE", parallel.world))
    network = one_machine(rates, node_size)
    if parallel.world > node_size:
        if rates.inter is None:
            raise UserError(
                "links between machines were not measured; mtraining plan --inter predicts with a rate that you give."
            )
        network = Network(node_size, network.intra, rates.inter)
    layout, shape = build_layout(config.layout.name, config.layout.unit), ModelShape.of(hf_model)
    batch, block = train.micro_batch_size, layers[0].index.block_size
    columns = round(sum(layer.columns for layer in layers) / len(layers))
    dense = all(layer.density >= 1 for layer in layers)
    index = Index.no_tiles(train.seq_len, block, columns, dense)
    # The mean layer; its tiles are those of all heads and of all sequences of the micro-batch.
    tiles = torch.stack([layer.tile_work for layer in layers]).mean(0).cpu() / batch
    work = LayerWork.of(index, layout, parallel.cp, shape.heads, shape.kv_heads, shape.head_dim, tiles)
    setting = Setting(
        parallel.dp, parallel.cp, parallel.cp_outer, layout, train.recompute, train.offload, train.fused,
        None if policies is None else tuple(policies), train.optimizer_state,
    )  # fmt: skip
    passes = attention_passes(work, parallel.cp_outer, rates, network)
    step = step_time(shape, index, setting, rates, network, passes, config.pattern.name != "dense")
    once = step.parts["optimizer"]
    sequences = train.batch_size // parallel.dp
    return (step.seconds - once) * sequences + once
