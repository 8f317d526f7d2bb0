"""What can be refused before any process, model or step exists: each problem in one sentence naming the option.

Checks that need the model (heads, head_dim, sliding windows, ...) are made by `mtraining.model.parallelize`, and the
vocabulary by `mtraining.data.SequenceDataset`, both before the first step.
"""

from __future__ import annotations

import torch

from mtraining.data import SequenceDataset, TokenShards
from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import CACHE_VARIABLE, device_name, tiles_in_use, tiles_path
from mtraining.layout import build_layout
from mtraining.model import Refresh
from mtraining.pattern import load_table
from mtraining.train.config import Config
from mtraining.train.mesh import Runtime
from mtraining.train.store import CheckpointStore, Manifest, read_manifest, require_complete


def check_config(config: Config) -> None:
    """Check everything about a run that needs neither processes nor a model.

    Raises:
        UserError: a sequence length that the layout cannot deal, more ranks than blocks, an unknown pattern, layout or
            option, data that is missing, empty, shorter than a sequence or outside the vocabulary, a run folder or
            checkpoint that cannot be used.
    """
    layout = build_layout(config.layout.name, config.layout.unit)
    Refresh.parse(config.pattern.refresh)
    for pattern in [config.pattern.build(), *config.patterns_by_layer.values()]:
        layout.check(config.train.seq_len, config.parallel.cp, pattern.block_size)
    if config.train.warmup_steps >= config.train.steps:
        raise UserError(
            f"train.warmup_steps={config.train.warmup_steps} leaves no step after the warm-up; "
            f"use fewer than train.steps={config.train.steps}."
        )
    if config.train.deterministic and config.train.kernel in ("flash4", "cudnn"):
        raise UserError(
            f"train.kernel={config.train.kernel} adds gradients in no fixed order, which train.deterministic=true "
            "forbids; use train.kernel=auto or triton."
        )
    check_output(config)
    SequenceDataset(
        TokenShards(config.data.path),
        config.train.seq_len,
        mode=config.data.mode,
        seed=config.train.seed,
        vocab_size=config.model.config.get("vocab_size"),
    )


def check_table(config: Config, layers: int) -> None:
    """Refuse a `pattern.table` with fewer or more layers than the model."""
    path = config.pattern.table
    if path is None:
        return
    given = len(load_table(path, config.pattern.name, **config.pattern.options))
    if given != layers:
        raise UserError(
            f"pattern.table={path} has {given} layers and the model {layers}; use a table made for this model."
        )


def check_output(config: Config) -> None:
    """Refuse a run folder that cannot be written, or that holds checkpoints which `resume: never` would mix with."""
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={config.output} cannot be made: {error.strerror}; choose another folder."
        ) from None
    latest = CheckpointStore(config.output).latest()
    if config.checkpoint.resume == "never":
        if latest is not None:
            raise UserError(
                f"output={config.output} already holds {latest.name}; set checkpoint.resume=auto to go on from it, or "
                "choose another output folder."
            )
    elif config.checkpoint.resume != "auto":
        check_cursor(config, require_complete(config.resume_path))
    elif latest is not None:
        check_cursor(config, read_manifest(latest))


def data_order(config: Config) -> dict[str, str | int]:
    """What fixes the order of samples; a checkpoint's place in the data means something only if these are the same."""
    return {
        "train.seq_len": config.train.seq_len,
        "train.batch_size": config.train.batch_size,
        "train.seed": config.train.seed,
        "data.mode": config.data.mode,
    }


def check_cursor(config: Config, manifest: Manifest) -> None:
    """Refuse to resume where the checkpoint's place in the data would point at other samples."""
    for option, value in data_order(config).items():
        if manifest.data.get(option) != value:
            raise UserError(
                f"{option}={value} differs from the checkpoint's {manifest.data.get(option)}, so its place in the data "
                f"is lost; restore {option}={manifest.data.get(option)}, or start a new output from an exported model."
            )


def check_same_model(here: dict[str, list[int]], manifest: Manifest, checkpoint: str) -> None:
    """Refuse a checkpoint whose parameters are not this model's by name and shape (name -> shape on both sides)."""
    there = manifest.shapes
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) == there.get(name):
            continue
        sizes = [
            f"has shape {tuple(shapes[name])}" if name in shapes else "is absent" for shapes in (there, here)
        ]
        raise UserError(
            f"checkpoint {checkpoint} is of another model: {name} {sizes[0]} there and {sizes[1]} here; use the "
            "configuration it was trained with, or another output folder."
        )


def check_same_tiles(place: Runtime, dtype: torch.dtype, head_dim: int) -> str:
    """Refuse ranks that would compute attention with different measured tiles on the same kind of GPU. Collective.

    Returns:
        What is in use, as `tiles_in_use` has it; the main rank's.

    Raises:
        UserError: on all ranks alike; also where one rank cannot read its tiles file.
    """
    here: str | UserError
    try:
        here = tiles_in_use(place.device, dtype, head_dim)
    except UserError as damaged:
        here = damaged
    everywhere = place.gather_objects((device_name(place.device), here))
    first: dict[str, tuple[int, str]] = {}
    for rank, (gpu, tiles) in enumerate(everywhere):
        if isinstance(tiles, UserError):
            raise tiles
        other, expected = first.setdefault(gpu, (rank, tiles))
        if tiles != expected:
            path = tiles_path(place.device)
            raise UserError(
                f"ranks {other} and {rank}, both on {gpu}, would compute attention with different tiles, so results "
                f"would depend on the machine that a rank runs on; copy {path.name} of one machine into the others' "
                f"{path.parent}, or set {CACHE_VARIABLE} to a folder that they share."
            )
    return first[everywhere[0][0]][1]
