"""Hugging Face's Trainer on sequences that are spread over processes.

The model's parameters are sharded in place and its attention is ours, so the Trainer goes on holding the transformers
model: its callbacks, schedules, logging and saving work on that. What is overridden here is what must know the ring:
who reads which batch, the loss, the norm of the gradient, and the files of a checkpoint.
"""

from __future__ import annotations

import logging
import os
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from mtraining.errors import UserError, first_line
from mtraining.integrations.batches import IGNORED, Dealer, shifted
from mtraining.integrations.options import (
    ContextParallelConfig,
    refuse_arguments,
    refuse_other_losses,
)
from mtraining.layout import Layout, build_layout
from mtraining.model import ParallelLM, parallelize
from mtraining.model.adapters import open_adapter, trained, without_frozen
from mtraining.model.export import whole_state
from mtraining.model.recompute import LayerPolicy
from mtraining.model.weights import load_weights
from mtraining.pattern import Pattern, build_pattern
from mtraining.predict.memory import Workload
from mtraining.ring import Ring
from mtraining.train.config import ParallelSection
from mtraining.train.mesh import build_mesh, limit_waits, process_groups
from mtraining.train.reader import SafeReader, load
from mtraining.train.recompute import choose_together

STATE = "mtraining"
"""The folder of a checkpoint that has the optimizer as shards, from which any number of processes resumes.

Weights are read from the Hugging Face folder around it. Those of an adapter are few, and are shards here too: its file
has peft's names for them.
"""


class ContextParallelTrainer(Trainer):
    """A `transformers.Trainer` whose processes share sequences; also the base of a trainer of TRL.

    Start the script by torchrun. Losses, gradients and updates are those of plain Trainer on one process with the same
    batch, up to the order of sums. ``per_device_train_batch_size`` counts sequences of a data-parallel group of ``cp``
    processes.

    TRL: ``class Mine(ContextParallelTrainer, SFTTrainer): pass``.

    Args:
        context_parallel: how sequences are spread; all processes share each by default.
        args, kwargs: as in Trainer.

    Raises:
        UserError: an argument that context parallelism cannot honour, or a model that `parallelize` refuses. Where a
            subclass is defined: one whose loss is not that of the next token.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_other_losses(cls, ContextParallelTrainer, Trainer)

    def __init__(
        self, *args: Any, context_parallel: ContextParallelConfig | None = None, **kwargs: Any
    ) -> None:
        self.context_parallel = context_parallel or ContextParallelConfig()
        given = kwargs.get("args") or (args[1] if len(args) > 1 else None)
        refuse_arguments(given, kwargs)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                "several GPUs, one process: start the script by torchrun, a process for each GPU."
            )
        self.parallel_model = self._parallelized()
        limit_waits(self.args.ddp_timeout, self._others)
        self.model_wrapped = self.parallel_model
        self.loss_is_scaled_for_ga = True  # it is divided by the labels of all micro-batches

    # -- the grid, and who reads what

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.dp_size, self.cp_size = self.context_parallel.grid(world)
        self.mesh: DeviceMesh | None = None
        self._others = process_groups()
        if dist.is_initialized():
            grid = ParallelSection(dp=self.dp_size, cp=self.cp_size, cp_outer=self.context_parallel.cp_outer)
            self.mesh = build_mesh(grid, self.args.device.type)
        self.dp_group = self.mesh["dp"].get_group() if self.mesh is not None else None
        ring = Ring.over(self._cp_mesh())
        self.cp_rank, self.dp_rank = ring.rank, (dist.get_rank() if world > 1 else 0) // self.cp_size
        accelerator = self.accelerator
        accelerator.prepare_data_loader = types.MethodType(self._dealt_loader, accelerator)
        accelerator.gather = self._gather_over_dp

    def _cp_mesh(self) -> DeviceMesh | None:
        if self.mesh is None:
            return None
        return self.mesh[tuple(name for name in self.mesh.mesh_dim_names or () if name != "dp")]

    def _dealt_loader(self, accelerator: Any, data_loader: Any, *_: Any, **__: Any) -> Any:
        """What accelerate does, for as many processes as there are data-parallel groups: a ring reads one batch."""
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return data_loader
        prepared = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=self.dp_size,
            process_index=self.dp_rank,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    def _gather_over_dp(self, value: Any) -> Any:
        """One value for each data-parallel group, along the first dimension: within a ring they are equal."""
        if self.dp_size == 1:
            return value

        def gathered(tensor: Tensor) -> Tensor:
            mine = (tensor[None] if tensor.ndim == 0 else tensor).contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.dp_size)]
            dist.all_gather(parts, mine, group=self.dp_group)
            return torch.cat(parts)

        return recursively_apply(gathered, value, error_on_other_type=True)

    def get_cp_size(self) -> int:
        return self.cp_size

    # -- the model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not dist.is_initialized():  # FSDP moves it shard by shard
            super()._move_model_to_device(model, device)

    def _parallelized(self) -> ParallelLM:
        options, args = self.context_parallel, self.args
        if args.bf16 and self.mesh is None:
            raise UserError("bf16=True needs FSDP; start the script by torchrun, one process is enough.")
        patterns = {
            layer: build_pattern(one) if isinstance(one, str) else one
            for layer, one in {-1: options.pattern, **options.layer_patterns}.items()
        }
        layout = build_layout(options.layout) if isinstance(options.layout, str) else options.layout
        blocks = {pattern.block_size for pattern in patterns.values()}
        self._dealer = Dealer(layout, blocks, self.cp_rank, self.cp_size)
        default = patterns.pop(-1)
        recompute: Any = options.recompute or ("full" if args.activation_checkpointing else "none")
        offload = options.offload
        if recompute == "auto":
            recompute, offload = self._chosen([default, *patterns.values()], layout), False
        made = parallelize(
            self.model,
            self.mesh,
            pattern=default,
            layer_patterns=patterns,
            layout=layout,
            kernel=options.kernel,
            recompute=recompute,
            offload=offload,
            fused=options.fused,
            float8=options.float8,
            param_dtype=torch.bfloat16 if args.bf16 else None,
            loss_chunk=options.loss_chunk,
        )
        # Layers recompute already; transformers' own would do it once more.
        self.model.activation_checkpointing_enable = lambda **_: None
        return made

    def _chosen(self, patterns: list[Pattern], layout: Layout) -> Sequence[LayerPolicy] | str:
        """What each layer keeps, from the memory of the smallest GPU. Collective."""
        options, args = self.context_parallel, self.args
        longest = options.longest(args)
        self._dealer.longest = longest
        hf_model, _ = open_adapter(self.model)
        work = Workload(
            hf_model,
            world=self.dp_size * self.cp_size,
            ring=(options.cp_outer, self.cp_size // options.cp_outer),
            seq_len=longest + -longest % self._dealer.multiple,
            batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            patterns=patterns,
            layout=layout,
            recompute="full",
            offload=options.offload,
            fused=options.fused,
            compute=torch.bfloat16 if args.bf16 else next(hf_model.parameters()).dtype,
            loss_chunk=options.loss_chunk,
        )
        choice, line = choose_together(work, args.device, _from_all)
        if self.is_world_process_zero():
            logging.getLogger("mtraining").info(line)
        return "none" if choice is None else choice.policies

    # -- loss and gradient

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Labels of all micro-batches on all processes: what the loss is divided by."""
        if not batch_samples:
            return None
        counts = [(shifted(batch["labels"]) != IGNORED).sum() for batch in batch_samples if "labels" in batch]
        if not counts:
            raise UserError("labels: the batch has none; use a data collator that makes them.")
        return self._gather_over_dp(torch.stack(counts).sum().to(device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This process's share of the mean loss; the shares of all processes add up to it."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        assert num_items_in_batch is not None
        dealt = self._dealer.deal(inputs)
        share = self.parallel_model(*dealt[:3], num_items_in_batch, dealt.starts)
        return (share, {"loss": share}) if return_outputs else share

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self.parallel_model.train()
        loss = super().training_step(model, *args, **kwargs)
        if self.mesh is not None:
            dist.all_reduce(loss)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean loss of the batches of all groups; no logits, since no process has them whole."""
        self.parallel_model.eval()
        inputs = self._prepare_inputs(inputs)
        labels = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad():
            # Trainer takes the mean over data-parallel groups, of shares of one mean.
            loss = self.compute_loss(model, inputs, num_items_in_batch=labels).detach() * self.dp_size
        if self.cp_size > 1:
            for name in ("cp",) if self.context_parallel.cp_outer == 1 else ("cp_outer", "cp_inner"):
                dist.all_reduce(loss, group=self.mesh[name].get_group())  # type: ignore[index]
        return loss, None, None

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        """Take the norm of sharded gradients as Trainer does where it knows that they are sharded."""
        return True

    # -- files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a Hugging Face folder, or an adapter's. Collective."""
        folder = output_dir or self.args.output_dir
        state = whole_state(self.parallel_model)
        adapter = self.parallel_model.adapter
        if self.args.should_save and adapter is None:
            self._save(folder, state_dict=state)
        elif self.args.should_save and adapter is not None:
            names = trained(self.parallel_model.hf_model, tied=True)
            adapter.save({name: state[name] for name in names}, Path(folder))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))
        if self.mesh is not None:
            dist.barrier()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model, optimizer = get_state_dict(self.parallel_model, self._torch_optimizer())
        state: dict[str, Any] = {"optimizer": optimizer}
        if self.parallel_model.adapter is not None:
            state["model"] = without_frozen(self.parallel_model, model)
        with _alone_is_meant():
            dcp.save(state, checkpoint_id=os.path.join(output_dir, STATE))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.parallel_model.adapter is None:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.mesh is not None)
            weights = self._whole_weights(resume_from_checkpoint)
            set_model_state_dict(self.parallel_model.hf_model, weights, options=options)
            return
        state = {"model": without_frozen(self.parallel_model, get_model_state_dict(self.parallel_model))}
        self._read(resume_from_checkpoint, state)
        # Frozen weights are not in it; every name that is was asked for.
        set_model_state_dict(self.parallel_model, state["model"], options=StateDictOptions(strict=False))

    def _whole_weights(self, folder: str) -> dict[str, Any]:
        """The weights that :meth:`save_model` wrote, on the first rank; none on others. Collective.

        Raises:
            UserError: files that are absent, damaged or of another model; on every rank.
        """
        box: list[str | None] = [None]
        state: dict[str, Any] = {}
        if self.mesh is None or dist.get_rank() == 0:
            kinds = {parameter.dtype for parameter in self.model.parameters()}
            try:
                config = AutoConfig.from_pretrained(folder)
                state = load_weights(folder, config, reduce(torch.promote_types, kinds), "", {}).state_dict()
            except UserError as error:
                box[0] = str(error).replace("model.init=", "resume_from_checkpoint=")
            except (OSError, ValueError) as error:
                box[0] = (
                    f"resume_from_checkpoint={folder!r} has no weights of a model ({first_line(error)}); give one "
                    "that this trainer saved."
                )
        if self.mesh is not None:
            dist.broadcast_object_list(box)
        if box[0] is not None:
            raise UserError(box[0])
        return state

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = self._torch_optimizer()
        state = {"optimizer": get_state_dict(self.parallel_model, optimizer)[1]}
        self._read(checkpoint, state)
        set_optimizer_state_dict(self.parallel_model, optimizer, state["optimizer"])
        path = os.path.join(checkpoint, SCHEDULER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))

    def _read(self, checkpoint: str, state: dict[str, Any]) -> None:
        folder = Path(checkpoint) / STATE
        if not folder.is_dir():
            raise UserError(
                f"resume_from_checkpoint={checkpoint!r} has no folder {STATE}/ with the state of a run: another "
                "trainer saved it, or save_only_model=True; give one that this trainer saved."
            )
        with _alone_is_meant():
            load(state, SafeReader(str(folder)))


def _from_all(value: Any) -> list[Any]:
    """Each process's value, in rank order. Collective."""
    if not dist.is_initialized():
        return [value]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, value)
    return everything


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """Where a process is alone, torch's checkpoints warn that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        yield
