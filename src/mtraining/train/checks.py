"""What can be refused before any process, model or step exists: each problem in one sentence naming the option.

Checks that need the model (heads, head_dim, sliding windows, ...) are made by `mtraining.model.parallelize`, and the
vocabulary by `mtraining.data.SequenceDataset`, both before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtraining.data import TokenShards, check_vocabulary
from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import CACHE_VARIABLE, device_name, tiles_in_use, tiles_path
from mtraining.layout import build_layout
from mtraining.model import Refresh
from mtraining.model.export_folder import check_target
from mtraining.model.float8 import check_float8, require_torchao
from mtraining.model.load import load_tokenizer
from mtraining.model.lora import require_peft
from mtraining.pattern import load_table
from mtraining.predict.moments import EIGHT_BITS
from mtraining.train.config import Config
from mtraining.train.corpus import RunData, build_dataset, data_sources
from mtraining.train.heldout import held_out
from mtraining.train.identity import check_options
from mtraining.train.mesh import Process, choose_device
from mtraining.train.optim import updates_lost
from mtraining.train.schedule import check_schedule
from mtraining.train.store import CheckpointStore, read_manifest, require_complete
from mtraining.train.trackers import check_trackers


def check_config(config: Config) -> RunData:
    """Check everything about a run that needs neither processes nor a model.

    Returns:
        the data that had to be opened and packed for it.

    Raises:
        UserError: a sequence length that the layout cannot deal, more ranks than blocks, an unknown pattern, layout or
            option, data that is missing, empty, shorter than a sequence or outside the vocabulary, a run folder or
            checkpoint that cannot be used.
    """
    layout = build_layout(config.layout.name, config.layout.unit)
    Refresh.parse(config.pattern.refresh)
    for pattern in [config.pattern.build(), *config.patterns_by_layer.values()]:
        layout.check(config.train.seq_len, config.parallel.cp, pattern.block_size)
        config.pattern.anneal.build().check(pattern)
    check_schedule(config.train)
    if config.train.deterministic and config.train.kernel in ("flash4", "cudnn"):
        raise UserError(
            f"train.kernel={config.train.kernel} adds gradients in no fixed order, which train.deterministic=true "
            "forbids; use train.kernel=auto or triton."
        )
    require_peft(config.model.lora)
    # No question to a GPU here: the allocator is set later, and must be before CUDA starts.
    check_float8(
        config.train.float8,
        choose_device(config, 0, 1).type,
        config.train.compute,
        config.model.lora.r > 0,
    )
    if config.train.optimizer_state == EIGHT_BITS:
        require_torchao("train.optimizer_state=8bit", "train.optimizer_state=offload")
    check_trackers(config.log.trackers)
    check_output(config)
    sources = data_sources(config)
    shards = [source.shards for source in sources]
    check_tokenizer(config, shards)
    dataset = build_dataset(config, sources)
    return RunData(dataset, held_out(config, shards) if config.evaluate.every is not None else None)


def check_tokenizer(config: Config, sources: Sequence[TokenShards]) -> None:
    """Refuse data that another tokenizer than the model's has encoded. A random model takes the data's."""
    if config.data.allow_other_tokenizer:
        return
    tokenizer = load_tokenizer(config.model)
    if tokenizer is not None:
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


def check_output(config: Config) -> None:
    """Refuse a run folder that cannot be written, whose export folder is not an export's, or that holds checkpoints
    which `resume: never` would mix with."""
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={config.output} cannot be made: {error.strerror}; choose another folder."
        ) from None
    if config.checkpoint.export:
        check_target(config.output / "export")
    store = CheckpointStore(config.output)
    named, latest = store.named(), store.latest()
    if config.checkpoint.resume == "never":
        if named:
            raise UserError(
                f"output={config.output} already holds {named[-1].name}; set checkpoint.resume=auto to go on from "
                "it, or choose another output folder."
            )
    elif config.checkpoint.resume != "auto":
        check_options(config, config.resume_path, require_complete(config.resume_path))
    elif latest is not None:
        check_options(config, latest, read_manifest(latest))


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
