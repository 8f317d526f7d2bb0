"""What can be refused before any process, model or step exists: each problem in one sentence naming the option.

Checks that need the model (heads, head_dim, sliding windows, ...) are made by `mtraining.model.parallelize`, and the
vocabulary by `mtraining.data.SequenceDataset`, both before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtraining.data import TokenShards, check_vocabulary
from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import CACHE_VARIABLE, device_name, tiles_in_use, tiles_path
from mtraining.model.load import load_tokenizer
from mtraining.pattern import load_table
from mtraining.train.config import Config
from mtraining.train.corpus import RunData, build_dataset, data_sources
from mtraining.train.early_checks import check_early
from mtraining.train.heldout import held_out
from mtraining.train.mesh import Process
from mtraining.train.optim import updates_lost
from mtraining.train.schedule import check_schedule


def check_config(config: Config) -> RunData:
    """Check everything about a run that needs neither processes nor a model.

    Returns:
        the data that had to be opened and packed for it, and the tokenizer that had to be loaded.

    Raises:
        UserError: what `check_early` refuses; data that is missing, empty, shorter than a sequence or outside the
            vocabulary.
    """
    check_early(config)
    check_schedule(config.train)
    sources = data_sources(config)
    shards = [source.shards for source in sources]
    tokenizer = load_tokenizer(config.model)
    if tokenizer is not None and not config.data.allow_other_tokenizer:
        check_tokenizer(config, shards, tokenizer)
    dataset = build_dataset(config, sources)
    held = held_out(config, shards) if config.evaluate.every is not None else None
    return RunData(dataset, held, tokenizer)


def check_tokenizer(config: Config, sources: Sequence[TokenShards], tokenizer: Any) -> None:
    """Refuse data that another tokenizer than the model's, ``tokenizer``, has encoded."""
    named = config.model.tokenizer or config.model.init
    for shards in sources:
        check_vocabulary(
            shards, tokenizer, named, ", or set data.allow_other_tokenizer=true if that is meant."
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


def rounding_warning(config: Config, process: Process, model: nn.Module) -> str | None:
    """What to warn of where updates are so small beside the weights that adding them changes nothing. Collective."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counts = process.sum(updates_lost(trainable, config.train.lr).to(process.device)).cpu()
    lost, held = counts[:, 0], counts[:, 1]
    if not (lost == held).any() and lost.sum() <= 1e-3 * held.sum():
        return None
    vectors = torch.tensor([parameter.ndim < 2 for parameter in trainable])
    remedy = (
        "use a larger train.lr"
        if config.model.dtype == "float32"
        else "set model.dtype=float32, which holds them finely and leaves computing in train.dtype"
    )
    return (
        f"warning: model.dtype={config.model.dtype} holds weights so coarsely that an update of train.lr="
        f"{config.train.lr:g} is rounded away in {lost.sum() / held.sum():.0%} of them, and in "
        f"{int(lost[vectors].sum())} of the {int(held[vectors].sum())} of norms and biases: they would hardly learn; "
        f"{remedy}."
    )


def check_same_tiles(process: Process, dtype: torch.dtype, head_dim: int) -> str:
    """Refuse ranks that would compute attention with different measured tiles on the same kind of GPU. Collective.

    Returns:
        What is in use, as `tiles_in_use` has it; the main rank's.

    Raises:
        UserError: on all ranks alike; also where one rank cannot read its tiles file.
    """
    here: str | UserError
    try:
        here = tiles_in_use(process.device, dtype, head_dim)
    except UserError as damaged:
        here = damaged
    everywhere = process.gather_objects((device_name(process.device), here))
    first: dict[str, tuple[int, str]] = {}
    for rank, (gpu, tiles) in enumerate(everywhere):
        if isinstance(tiles, UserError):
            raise tiles
        other, expected = first.setdefault(gpu, (rank, tiles))
        if tiles != expected:
            path = tiles_path(process.device)
            raise UserError(
                f"ranks {other} and {rank}, both on {gpu}, would compute attention with different tiles, so results "
                f"would depend on the machine that a rank runs on; copy {path.name} of one machine into the others' "
                f"{path.parent}, or set {CACHE_VARIABLE} to a folder that they share."
            )
    return first[everywhere[0][0]][1]
