"""What context parallelism needs to know beside the arguments of a trainer, and which of those it cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mtraining.errors import UserError
from mtraining.layout import Layout
from mtraining.model.float8_checks import Float8
from mtraining.pattern import Pattern


@dataclass(frozen=True)
class ContextParallelConfig:
    """How `ContextParallelTrainer` spreads sequences over processes, and what attention computes.

    Attributes:
        cp: processes that share one sequence; None is all of them. The others are data parallel.
        cp_outer: nodes among the ``cp`` processes, each a ring of its own.
        pattern: what attention computes; an object, or a name of `mtraining.pattern.PATTERNS`.
        layer_patterns: other patterns for some layers, by number.
        layout: who holds which tokens; an object or a name.
        kernel: backend of the attention kernels.
        recompute: as in `mtraining.model.parallelize`, or ``auto``: as little as the GPU's memory allows, chosen for
            each layer from ``seq_len``. None is ``full`` where the trainer's arguments ask for activation
            checkpointing, else ``none``.
        offload: what recompute keeps waits in pinned host memory.
        fused: how what surrounds attention is computed.
        float8: products of the linear layers of decoder layers, as in `mtraining.model.parallelize`.
        loss_chunk: tokens whose logits exist at one time.
        seq_len: tokens of the longest sequence, which ``recompute="auto"`` must know; longer batches are refused then.
            None is ``max_length`` of TRL's arguments.
    """

    cp: int | None = None
    cp_outer: int = 1
    pattern: Pattern | str = "vertical_slash"
    layer_patterns: Mapping[int, Pattern | str] = field(default_factory=dict)
    layout: Layout | str = "striped"
    kernel: str = "auto"
    recompute: Literal["auto", "full", "keep_attention", "none"] | None = None
    offload: bool = False
    fused: Literal["none", "compile", "liger"] = "none"
    float8: Float8 = "off"
    loss_chunk: int = 8192
    seq_len: int | None = None

    def longest(self, args: Any) -> int:
        """Tokens of the longest sequence.

        Args:
            args: a `TrainingArguments`, or one of TRL's configs.

        Raises:
            UserError: nobody says.
        """
        found = self.seq_len or getattr(args, "max_length", None)
        if not found:
            raise UserError(
                "recompute='auto' must know the longest sequence; use ContextParallelConfig(seq_len=...), or set "
                "recompute to 'full', 'keep_attention' or 'none'."
            )
        return int(found)

    def grid(self, world: int) -> tuple[int, int]:
        """(dp, cp) of ``world`` processes.

        Raises:
            UserError: processes that cannot be divided so.
        """
        cp = world if self.cp is None else self.cp
        if cp < 1 or world % cp:
            raise UserError(
                f"context_parallel: cp={cp} does not divide the {world} processes that were launched; use a divisor."
            )
        if self.cp_outer < 1 or cp % self.cp_outer:
            raise UserError(f"context_parallel: cp_outer={self.cp_outer} must divide cp={cp}.")
        return world // cp, cp


# Arguments of transformers' and TRL's trainers, and what to do instead. Each is refused unless it is false.
_REFUSED = {
    "fsdp": "parameters are sharded already; leave it out",
    "deepspeed": "parameters are sharded already; leave it out",
    "parallelism_config": "say cp in ContextParallelConfig instead",
    "torch_compile": "use ContextParallelConfig(fused='compile')",
    "use_liger_kernel": "use ContextParallelConfig(fused='liger')",
    "label_smoothing_factor": "the chunked loss does not compute it; set it to 0",
    "fp16": "use bf16=True",
    "auto_find_batch_size": "set per_device_train_batch_size",
    "activation_offloading": "use ContextParallelConfig(offload=True)",
    "batch_eval_metrics": "logits are never whole; leave it out",
}


def refuse_arguments(args: Any, trainer_options: Mapping[str, Any]) -> None:
    """Refuse what would be computed otherwise than asked.

    Args:
        args: a `TrainingArguments`, or one of TRL's configs.
        trainer_options: the other arguments of the trainer.

    Raises:
        UserError: naming the argument and the remedy.
    """
    for name, remedy in _REFUSED.items():
        if getattr(args, name, None):
            raise UserError(f"{name}={getattr(args, name)!r} does not go with context parallelism: {remedy}.")
    if getattr(args, "loss_type", "nll") != "nll":
        raise UserError(f"loss_type={args.loss_type!r}: the chunked loss computes 'nll' alone; use that.")
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance":
        raise UserError("train_sampling_strategy='batch_rebalance' deals sequences by rank; use another one.")
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"):
        if trainer_options.get(name) is not None:
            why = "the model is made once" if name == "model_init" else "logits are never whole"
            raise UserError(f"{name}: {why} under context parallelism; leave it out.")


# What a trainer whose loss is not that of the next token has for itself.
_STEPS = (
    "compute_loss",
    "training_step",
    "prediction_step",
    "train",
    "_inner_training_loop",
    "_prepare_inputs",
)


def refuse_other_losses(kind: type, ours: type, plain: type) -> None:
    """Refuse a trainer class whose bases compute another loss than that of the next token.

    Args:
        kind: a subclass of ``ours``, as it is defined.
        ours: `ContextParallelTrainer`.
        plain: `transformers.Trainer`.

    Raises:
        UserError: naming the class and the remedy.
    """
    order = kind.__mro__
    place = order.index(ours)
    for one in order[:place]:
        if issubclass(one, plain) and not issubclass(one, ours):
            raise UserError(
                f"{kind.__name__}: {one.__name__} stands before {ours.__name__} among its bases, so that its loss "
                f"would be computed; put {ours.__name__} first."
            )
        if "compute_loss" in vars(one):
            raise UserError(
                f"{one.__name__}.compute_loss: no process has the whole sequence that a loss of one's own would be "
                "given; leave it out."
            )
    for one in order[place + 1 : order.index(plain)]:
        own = [name for name in _STEPS if name in vars(one)]
        # The loss of SFTTrainer is that of the next token, and refuse_arguments refuses its others.
        if own and not (one.__name__ == "SFTTrainer" and one.__module__.startswith("trl.")):
            raise UserError(
                f"{one.__name__}: its {own[0]} is its own, and on shared sequences only the next-token loss of "
                "Trainer and of TRL's SFTTrainer is computed; use one of these."
            )
