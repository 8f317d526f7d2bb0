"""What the configuration and the run folder alone tell. A launcher refuses it before it starts any rank, and each rank
checks it again: that takes milliseconds, and needs neither transformers nor data."""

from __future__ import annotations

from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import Refresh
from mtraining.model.export_folder import check_target
from mtraining.model.float8_checks import check_float8, require_torchao
from mtraining.model.lora import require_peft
from mtraining.predict.moments import EIGHT_BITS
from mtraining.train.config import Config
from mtraining.train.identity import check_options
from mtraining.train.mesh import choose_device
from mtraining.train.store import CheckpointStore, read_manifest, require_complete
from mtraining.train.trackers import check_trackers


def check_early(config: Config) -> None:
    """
    Raises:
        UserError: an unknown pattern, layout or option, or a package that is missing; a sequence length that the layout
            cannot deal, or more ranks than blocks; a run folder or checkpoint that cannot be used.
    """
    layout = build_layout(config.layout.name, config.layout.unit)
    Refresh.parse(config.pattern.refresh)
    for pattern in [config.pattern.build(), *config.patterns_by_layer.values()]:
        layout.check(config.train.seq_len, config.parallel.cp, pattern.block_size)
        config.pattern.anneal.build().check(pattern)
    if config.train.deterministic and config.train.kernel in ("flash4", "cudnn"):
        raise UserError(
            f"train.kernel={config.train.kernel} adds gradients in no fixed order, which train.deterministic=true "
            "forbids; use train.kernel=auto or triton."
        )
    require_peft(config.model.lora)
    if config.train.float8 != "off":
        # No question to a GPU here: the allocator is set later, and must be before CUDA starts.
        device = choose_device(config, 0, 1).type
        check_float8(config.train.float8, device, config.train.compute, config.model.lora.r > 0)
    if config.train.optimizer_state == EIGHT_BITS:
        require_torchao("train.optimizer_state=8bit", "train.optimizer_state=offload")
    check_trackers(config.log.trackers)
    check_output(config)


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
