"""One optimizer step: micro-batches forward and backward, one gradient of the global mean loss, one update.

The loss of a step is the sum of all token losses over ranks and micro-batches, divided by the global number of labels;
so the gradient is that of one large batch, however it is cut.

Counts, loss and norm stay on the device, which itself holds the update back when one of them is not finite; the host
launches a whole step before it waits once, to read four numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.model import ParallelLM
from mtraining.model.support import layers_of
from mtraining.ring import AttentionStats, Observer
from mtraining.train.mesh import Process
from mtraining.train.optim import (
    clip_gradients,
    gradient_norm,
    layer_gradient_norms,
    set_learning_rate,
    step_where_finite,
)
from mtraining.train.schedule import learning_rate

if TYPE_CHECKING:
    from mtraining.train.config import TrainSection

Batch = Mapping[str, Tensor]
IGNORED = -100


class NonFinite(ArithmeticError):
    """The loss or the gradient of a step is NaN or infinite. `what` says which, `ranks` where it shows."""

    def __init__(self, what: str, value: float, ranks: list[int]) -> None:
        super().__init__(f"{what} is {value}")
        self.what, self.value, self.ranks = what, value, ranks


@dataclass(frozen=True)
class StepResult:
    """What one step gave, equal on every rank: the global mean loss, the gradient norm before clipping, the learning
    rate used, and (when observed) the attention statistics of its first micro-batch, one entry a layer, and the share
    of distances that received no gradient."""

    loss: float
    grad_norm: float
    lr: float
    stop: bool = False
    attention: list[AttentionStats] = field(default_factory=list)
    telemetry: dict[str, Any] = field(default_factory=dict)


class Stepper:
    """Runs optimizer steps on one model. Every rank calls it alike."""

    def __init__(
        self,
        model: ParallelLM,
        optimizer: torch.optim.AdamW,
        options: TrainSection,
        process: Process,
        accumulation: int,
    ) -> None:
        self._model, self._optimizer, self._options = model, optimizer, options
        self._process, self._accumulation = process, accumulation

    def run(
        self,
        batches: Iterator[Batch],
        step: int,
        *,
        observe: bool = False,
        recall_rows: int = 0,
        stop: Tensor | None = None,
    ) -> StepResult:
        """Take this step's micro-batches from `batches` and make optimizer step `step` (0-based). Collective.

        stop: a float64 scalar on the host (pinned for a GPU), above 0 where this rank is asked to stop. The device
            reads it when it comes to the loss, so it may be set while the host waits for the step.

        Raises:
            NonFinite: the optimizer has changed nothing.
            UserError: no token of the step has a label; or position ids or labels that cannot be trained on, before
                the optimizer has used them.
        """
        device = self._process.device
        pieces = [
            {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
            for _ in range(self._accumulation)
        ]
        labels = torch.stack([(piece["labels"] != IGNORED).sum() for piece in pieces]).sum()
        labels = self._process.sum(labels)
        observers: list[Observer] = []
        local = torch.zeros((), dtype=torch.float64, device=device)
        with self._model.training_step(step + 1):
            for number, piece in enumerate(pieces):
                if observe and number == 0:
                    observers.append(Observer(recall_rows=recall_rows))
                with observers[0] if observers and number == 0 else nullcontext():
                    share = self._model(
                        piece["input_ids"],
                        piece["position_ids"],
                        piece["labels"],
                        labels,
                        starts=piece.get("starts"),
                    )
                share.backward()
                local += share.detach().double()
        asked = local.new_zeros(()) if stop is None else stop.to(device, non_blocking=True)
        loss, stops = self._process.sum(torch.stack([local, asked])).unbind()
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        norm = gradient_norm(parameters)
        # Before clipping, and read after the step, as all other telemetry is.
        layer_norms = layer_gradient_norms(layers_of(self._model.hf_model)) if observe else None
        clip_gradients(parameters, norm, self._options.clip)
        lr = learning_rate(step, self._options)
        set_learning_rate(self._optimizer, lr)
        step_where_finite(self._optimizer, loss.isfinite() & norm.isfinite())
        # The step's only wait for the device, with the update already under way there.
        labels_seen, loss_seen, norm_seen, stops_seen = torch.stack(
            [labels.double(), loss, norm.double(), stops]
        ).tolist()
        if labels_seen == 0:
            raise UserError(
                f"step {step + 1}: no token of the batch has a label, so there is nothing to learn; check the data."
            )
        if not math.isfinite(loss_seen):
            self._refuse_inputs(step, pieces)
        self._require_finite("the loss", loss_seen, local)
        self._require_finite("the gradient norm", norm_seen, None)
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss_seen,
            grad_norm=norm_seen,
            lr=lr,
            stop=stops_seen > 0,
            attention=[stats for observer in observers for stats in observer.stats],
            telemetry={} if layer_norms is None else self._telemetry(layer_norms),
        )

    def _telemetry(self, layer_norms: Tensor) -> dict[str, Any]:
        """What a logged step says besides (docs/see.md): coverage and stability of indices, gradient norms of
        layers. Collective, and waits for the device."""
        indices = self._model.indices
        found: dict[str, Any] = {**indices.uncovered(self._options.seq_len), **indices.unread()}
        stability = indices.moved()
        if stability:
            found["layer_stability"] = stability
        # JSON has no infinity; the gradient norm itself stops a run that is not finite.
        found["layer_grad_norm"] = [norm if math.isfinite(norm) else None for norm in layer_norms.tolist()]
        return found

    def _refuse_inputs(self, step: int, pieces: list[dict[str, Tensor]]) -> None:
        """Where the loss is not finite: say so if a rank's batches are why. All ranks raise alike."""
        fault = ""
        try:
            for piece in pieces:
                self._model.refuse_inputs(piece["position_ids"], piece["labels"], piece.get("starts"))
        except UserError as error:
            fault = str(error)
        for rank, found in enumerate(self._process.gather_objects(fault)):
            if found:
                raise UserError(f"step {step + 1}, rank {rank}: {found}")

    def _require_finite(self, what: str, value: float, local: Tensor | None) -> None:
        """`value` is equal on all ranks, so all ranks raise together; only then does it cost a second collective."""
        if math.isfinite(value):
            return
        mine = float(local) if local is not None else self._local_gradient_sum()
        ranks = [rank for rank, share in enumerate(self._process.gather(mine)) if not math.isfinite(share)]
        raise NonFinite(what, value, ranks)

    def _local_gradient_sum(self) -> float:
        """The sum of this rank's shards of the gradient: finite exactly where they are (up to overflow)."""
        total = torch.zeros((), dtype=torch.float64, device=self._process.device)
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                total += (grad.to_local() if hasattr(grad, "to_local") else grad).double().sum()
        return float(total)
