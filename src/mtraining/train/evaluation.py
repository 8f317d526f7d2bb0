"""Evaluation while training: held-out loss by position, and suites of questions, on the ranks and ring that train.

An evaluation leaves nothing behind: random state, indices that training holds or counts, and the place in the data are
what they were. So a run with evaluations and one without train the same model, bit for bit.

Replicas share the sequences out. Each sequence's sums are exact copies on every rank and are added in the order of the
sequences, so results do not depend on the number of replicas.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mtraining.data import TokenShards
from mtraining.errors import UserError
from mtraining.generate import Generator
from mtraining.generate.losses import bucketed, perplexity
from mtraining.model import ParallelLM
from mtraining.pattern import Dense, Pattern
from mtraining.train.config import Config
from mtraining.train.heldout import HeldOut, check_words, shards_tokenizer, shared_documents
from mtraining.train.mesh import Process
from mtraining.train.policy import OVER_STEPS, flat_options
from mtraining.train.resume import on_main

MARK = "evaluation"  # a record of metrics.jsonl with this key is one of an evaluation
_SHARE = 8  # buckets of a length, where `evaluate.bucket` names no size
Stopped = Callable[[], bool]


class Suite(Protocol):
    """Questions that a model is asked. Collective over all ranks, each of which gets the same rows."""

    def __call__(self, generator: Generator, stopped: Stopped) -> list[dict[str, Any]] | None:
        """Rows with ``suite``, ``task``, ``length``, ``samples`` and ``score`` (percent); None when ``stopped``, asked
        between samples on every rank, says so."""
        ...


class SuiteBuilder(Protocol):
    """Makes the suites of `evaluate.suites`; rooms above this one have them."""

    def __call__(
        self,
        names: Sequence[str],
        lengths: Sequence[int],
        samples: int,
        essays: Path | None,
        seed: int,
        tokenizer: Any,
    ) -> Suite:
        """`UserError` for what cannot be asked, before any step."""
        ...


class Evaluation:
    """Evaluates one run. Every rank calls it alike.

    Args:
        held: the held-out sequences; None for none.
        suite: what is asked besides; None for nothing.
        tokenizer: of the suite's answers.

    Attributes:
        losses: held-out losses by step, of evaluations that measured the same as this run does.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        model: ParallelLM,
        held: HeldOut | None,
        suite: Suite | None,
        tokenizer: Any,
    ) -> None:
        self.losses: dict[int, float] = {}
        self._config, self._process, self._model = config, process, model
        self._held, self._suite = held, suite
        self._known: set[int] = set()
        self._measure = _measure(config, held)
        self._generators = {
            name: Generator(
                model, tokenizer, pattern=evaluation_pattern(config, name), kernel=config.train.kernel
            )
            for name in config.evaluate.attention
        }

    def go_on_from(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the evaluations that are among the main rank's records of the run as done. Collective."""
        found = [
            (record["step"], record[MARK], record.get("held_out_loss"))
            for record in records
            if MARK in record
        ]
        for step, measure, loss in self._process.from_main(found):
            self._known.add(step)
            if measure == self._measure and loss is not None:
                self.losses[step] = loss

    def owed(self, step: int) -> bool:
        """Whether an evaluation after ``step`` optimizer steps is due and not done."""
        if step in self._known:
            return False
        settings = self._config.evaluate
        assert settings.every is not None
        if step == 0:
            return settings.at_start
        return step % settings.every == 0 or step == self._config.train.steps

    def is_best(self, step: int) -> bool:
        """Whether no evaluation after an earlier step had so low a held-out loss. Weights that no step has changed are
        left aside: they are where they came from."""
        loss = self.losses.get(step, math.nan)
        earlier = [other for at, other in self.losses.items() if 0 < at != step and math.isfinite(other)]
        return step > 0 and math.isfinite(loss) and all(loss < other for other in earlier)

    def run(self, step: int, stopped: Stopped, progress: Callable[[str], None]) -> dict[str, Any] | None:
        """Evaluate after ``step`` optimizer steps. Collective.

        Args:
            stopped: asked between sequences, on every rank alike, whether to give up.
            progress: shows how far it is.

        Returns:
            a record of metrics.jsonl, equal on every rank but for seconds; None when it was given up.
        """
        start = time.perf_counter()
        record: dict[str, Any] = {"step": step, MARK: self._measure}
        with self._apart():
            if self._held is not None:
                losses = self._held_out(stopped, progress)
                if losses is None:
                    return None
                record |= {"held_out_loss": headline(losses)["loss"], "held_out": losses}
            if self._suite is not None:
                answers = self._asked(stopped, progress)
                if answers is None:
                    return None
                record["suites"] = answers
        record["evaluation_seconds"] = time.perf_counter() - start
        self._known.add(step)
        if "held_out_loss" in record:
            self.losses[step] = record["held_out_loss"]
        return record

    def _held_out(self, stopped: Stopped, progress: Callable[[str], None]) -> list[dict[str, Any]] | None:
        assert self._held is not None
        found = []
        for attention, generator in self._generators.items():
            for length in self._held.starts:
                width = self._config.evaluate.bucket or max(2, -(-length // _SHARE))
                sums = self._sums(generator, attention, length, width, stopped, progress)
                if sums is None:
                    return None
                tokens, nll = sums.sum(0)
                total, count = float(nll.sum()), int(tokens.sum())
                found.append(
                    {
                        "attention": attention,
                        "length": length,
                        "sequences": len(sums),
                        "tokens": count,
                        "loss": total / count,
                        "perplexity": perplexity(total, count),
                        "bucket": width,
                        "by_position": (nll / tokens).tolist(),
                        "documents": self._held.names(length),
                        "by_sequence": (sums[:, 1] / sums[:, 0]).tolist(),
                    }
                )
        return found

    def _sums(
        self,
        generator: Generator,
        attention: str,
        length: int,
        width: int,
        stopped: Stopped,
        progress: Callable[[str], None],
    ) -> Tensor | None:
        """float64 (sequences, 2, buckets): tokens and summed losses of every sequence, on every rank."""
        assert self._held is not None
        count, dp = len(self._held.starts[length]), self._config.parallel.dp
        buckets = -(-length // width)
        sums = torch.zeros(count, 2, buckets, dtype=torch.float64)
        for first in range(0, count, dp):
            if stopped():
                return None
            progress(f"evaluating: sequence {first + 1} of {count}, {length} tokens, {attention}")
            # Parameters are sharded over replicas too, so one without a sequence reads along.
            mine = first + self._process.dp_rank
            nll = generator.token_nll(self._held.tokens(length, min(mine, count - 1)))
            if mine < count and self._process.cp_rank == 0:
                read = bucketed(nll, width, last=width)
                sums[mine] = torch.tensor([read.bucket_tokens, read.bucket_nll], dtype=torch.float64)
        # One rank has the numbers of a sequence and all others zeros, so the sum is exact.
        return self._process.sum(sums.to(self._process.device)).cpu()

    def _asked(self, stopped: Stopped, progress: Callable[[str], None]) -> list[dict[str, Any]] | None:
        assert self._suite is not None
        found = []
        for attention, generator in self._generators.items():
            progress(f"evaluating: {', '.join(self._config.evaluate.suites)}, {attention}")
            rows = self._suite(generator, stopped)
            if rows is None:
                return None
            found += [{"attention": attention} | row for row in rows]
        return found

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Random state is what it was afterwards, and no parameter stays gathered."""
        device = self._process.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def build_evaluation(
    config: Config,
    process: Process,
    model: ParallelLM,
    held: HeldOut | None,
    training: Sequence[TokenShards],
    tokenizer: Any,
    builder: SuiteBuilder | None,
    tell: Callable[[str], None],
) -> Evaluation | None:
    """The evaluation that a configuration asks for; None where it asks for none. Collective.

    Args:
        held: the held-out sequences; None for none.
        training: the sources that are trained on.
        tokenizer: the model's; None takes that of the training data.
        builder: of `evaluate.suites`.

    Raises:
        UserError: anything that would stop an evaluation, before the first step.
    """
    settings = config.evaluate
    if settings.every is None:
        return None
    check_positions(config, model.hf_model.config)
    if held is not None:
        check_words(held.shards, model.hf_model.config.vocab_size)
        told = on_main(process, lambda: _overlap(config, held, training))
        if told:
            tell(told)
    suite = None
    if settings.suites:
        if builder is None:
            raise UserError(
                f"evaluate.suites={', '.join(settings.suites)} needs the suites themselves: train with mtraining "
                "train, or give train() suites=mtraining.evaluate.in_training.build_suite."
            )
        tokenizer = shards_tokenizer(training[0]) if tokenizer is None else tokenizer
        suite = builder(
            settings.suites,
            config.evaluate_lengths,
            settings.needle_samples,
            settings.essays,
            settings.seed,
            tokenizer,
        )
    return Evaluation(config, process, model, held, suite, tokenizer)


def evaluation_pattern(config: Config, attention: str) -> Pattern | None:
    """What all layers attend to under an entry of `evaluate.attention`; None for what training gives each."""
    return Dense(block_size=config.pattern.build().block_size) if attention == "dense" else None


def check_positions(config: Config, hf_config: Any) -> None:
    """Refuse lengths that the model has no positions for."""
    covered, longest = int(hf_config.max_position_embeddings), config.evaluate_lengths[-1]
    if config.evaluate.every is not None and longest > covered:
        raise UserError(
            f"evaluate.lengths: {longest} tokens are beyond the {covered} positions of the model; ask for shorter "
            "sequences, or stretch its positions with model.rope."
        )


def headline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of an evaluation's rows, the one whose loss is the run's held-out loss: the longest length, under the first
    attention."""
    return [row for row in rows if row["attention"] == rows[0]["attention"]][-1]


def curves(record: Mapping[str, Any]) -> dict[str, Any]:
    """What TensorBoard shows of an evaluation, by the name of its curve."""
    found: dict[str, Any] = {"step": record["step"]}
    if "held_out_loss" in record:
        found["held_out_loss"] = record["held_out_loss"]
    for row in record.get("held_out", ()):
        name = f"held_out/{row['attention']}/{row['length']}"
        found |= {f"{name}/loss": row["loss"], f"{name}/by_position": row["by_position"]}
    for row in record.get("suites", ()):
        found[f"{row['suite']}/{row['attention']}/{row['task']}/{row['length']}"] = row["score"]
    return found


def told(record: Mapping[str, Any]) -> str:
    """One line for a person."""
    rows = record.get("held_out", ())
    parts = [
        f"held-out loss {row['loss']:.4f} at {row['length']} tokens ({row['attention']})" for row in rows
    ]
    if rows:
        parts.append(f"by position {' '.join(f'{loss:.2f}' for loss in headline(rows)['by_position'])}")
    parts += [
        f"{row['task']} {row['score']:.0f} % at {row['length']} tokens ({row['attention']})"
        for row in record.get("suites", ())
    ]
    return f"evaluation at step {record['step']}: {'; '.join(parts)}; {record['evaluation_seconds']:.1f} s"


def _measure(config: Config, held: HeldOut | None) -> str:
    """Tells held-out losses apart that are not of the same text, read in the same way; "" without held-out text."""
    if held is None:
        return ""
    settings, longest = config.evaluate, config.evaluate_lengths[-1]
    of: list[Any] = [
        held.shards.identity, config.data.mode, longest, len(held.starts[longest]), settings.attention[0],
    ]  # fmt: skip
    if settings.attention[0] == "train":
        options = flat_options(config)
        names = [name for name in options if name.startswith(("pattern.", "layer_patterns"))]
        # What training holds or adds over steps has no part in an evaluation.
        of.append({name: options[name] for name in names if not name.startswith(OVER_STEPS)})
    return xxhash.xxh3_64_hexdigest(json.dumps(of, sort_keys=True).encode())


def _overlap(config: Config, held: HeldOut, training: Sequence[TokenShards]) -> str:
    """A warning of documents that are trained on as well; "" where there are none."""
    shared = shared_documents(held, training)
    if not shared:
        return ""
    read = len(held.documents())
    some = f"such as '{shared[0]}'"
    if len(shared) == read:
        raise UserError(
            f"evaluate.data={held.shards.path}: every document that would be read, {some}, stands in "
            f"{config.data.named} too, so its loss would tell nothing of unseen text; hold documents out with "
            "mtraining prepare --holdout, or give other text."
        )
    return (
        f"warning: {len(shared)} of the {read} documents that are read of evaluate.data={held.shards.path}, "
        f"{some}, stand in {config.data.named} too: the held-out loss is too low by what was learned of them."
    )
