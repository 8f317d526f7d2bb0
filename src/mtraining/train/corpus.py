"""The data of a run: its sources as the configuration names them, and what a step reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtraining.data import DataSource, SequenceDataset, TokenShards, step_plan
from mtraining.layout import build_layout
from mtraining.train.config import Config
from mtraining.train.heldout import HeldOut, shards_tokenizer
from mtraining.train.mesh import Process


@dataclass(frozen=True)
class RunData:
    """What a run reads, opened and checked once.

    Attributes:
        dataset: whole sequences; :func:`rank_dataset` deals them.
        held: what evaluations read; None for nothing.
        tokenizer: the model's, of transformers; None for a random model and for weights alone.
    """

    dataset: SequenceDataset
    held: HeldOut | None
    tokenizer: Any


def data_sources(config: Config) -> list[DataSource]:
    """The prepared folders, opened.

    Raises:
        UserError: one is missing or damaged.
    """
    return [
        DataSource(TokenShards(source.path), source.label, source.weight, source.max_epochs)
        for source in config.data.every_source
    ]


def build_dataset(config: Config, sources: Sequence[DataSource]) -> SequenceDataset:
    """The sequences of a run, whole.

    Raises:
        UserError: data that cannot be used, or sources that reach their caps before the last step.
    """
    dataset = SequenceDataset(
        sources,
        config.train.seq_len,
        mode=config.data.mode,
        seed=config.train.seed,
        vocab_size=config.model.config.get("vocab_size"),
        look_ahead=config.data.look_ahead,
    )
    dataset.counts(config.train.steps * config.train.batch_size)
    return dataset


def rank_dataset(
    config: Config, dataset: SequenceDataset, process: Process, vocab_size: int
) -> SequenceDataset:
    """A rank's view of the data: its context-parallel share of every sequence.

    Raises:
        UserError: an id outside the vocabulary.
    """
    layout = build_layout(config.layout.name, config.layout.unit)
    return dataset.dealt(layout, process.cp_rank, config.parallel.cp, vocab_size)


def data_tokenizer(config: Config) -> Any:
    """The tokenizer that the shards were made with, to go into the exported folder beside a random model."""
    return shards_tokenizer(TokenShards(config.data.every_source[0].path))


def mix(config: Config, dataset: SequenceDataset, steps: int) -> str:
    """What each source gives in the first ``steps`` steps, in words; "" for one source."""
    if len(dataset.sources) == 1:
        return ""
    counts = dataset.counts(steps * config.train.batch_size)
    return f"sequences of {steps:,} steps by source: {', '.join(count.render() for count in counts)}"


def data_record(config: Config, dataset: SequenceDataset, step: int) -> dict[str, Any]:
    """What a metrics record says of the data of a step, from 0: the same on every rank.

    ``padding``: share of the positions of packed sequences that hold no token. ``replica_imbalance``: see
    `mtraining.data.loader.StepPlan.imbalance`. ``sequences/NAME``: sequences of each source so far, of a mixture.
    """
    batch = config.train.batch_size
    record: dict[str, Any] = {}
    if dataset.mode == "packed":
        plan = step_plan(
            dataset,
            step,
            global_batch=batch,
            dp_size=config.parallel.dp,
            micro_batch=config.train.micro_batch_size,
        )
        windows = [window for rank in plan.windows for window in rank]
        record["padding"] = dataset.padding(windows) / (batch * config.train.seq_len)
        if plan.imbalance is not None:
            record["replica_imbalance"] = plan.imbalance
    if len(dataset.sources) > 1:
        for count in dataset.counts((step + 1) * batch):
            record[f"sequences/{count.name}"] = count.sequences
    return record
