"""Measure one trained model: losses of held-out text by position, tasks, and copying, under each way of reading.

    python recipes/study/measure.py STUDY STAGES NAME MODEL [ROPE]

STAGES are some of text, copy and tasks, joined by commas. `STUDY/measure.yaml` says what of each. A line of
`STUDY/measured/NAME/results.jsonl` is written when a sample ends, so the same command goes on where it was stopped.
Results of other weights under the same name are removed: dense attention's gradients differ from run to run.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from associative import Vocabulary, answers

from mtraining.data import TokenShards
from mtraining.errors import UserError
from mtraining.evaluate.results import Key, Results, model_fingerprint, tokenizer_fingerprint
from mtraining.evaluate.runner import Document, evaluate, read_documents
from mtraining.evaluate.runner import Plan as Questions
from mtraining.evaluate.tasks import SampleMaker, Sources, build_tasks
from mtraining.generate import Generator, parse_attention
from mtraining.generate.losses import bucketed
from mtraining.inputs.yaml_text import read_yaml
from mtraining.kernel import SparseIndex
from mtraining.model import RopeOptions
from mtraining.pattern import Dense, Pattern
from mtraining.ring import Observer
from mtraining.train.named import NamedModel, find_model
from mtraining.train.store import CheckpointStore

# Names of two ways of reading: with full attention, which a plan must call so, and by the pattern of training.
DENSE, OWN = "dense", "own"
CUE = 16  # first tokens of a repeated span, from which the model learns that it is one


def measure(study: Path, stages: Sequence[str], name: str, model: str, rope: Mapping[str, Any]) -> None:
    """Do what of ``measure.yaml`` is not done yet of one model.

    Args:
        stages: some of "text", "copy" and "tasks"; a plan that asks for answers has one stage of its own.
        name: under which its results stand.
        model: a run folder, or a model by its name.
        rope: of a model that is no run's.

    Raises:
        UserError: a model or text that is not there.
    """
    wanted = read_yaml((study / "measure.yaml").read_text(encoding="utf-8"), "measure.yaml")
    named = find_model(model, RopeOptions(**rope) if rope else None)
    tokenizer = named.tokenizer()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    hf_model = named.build(dtype, device, wanted["seq_len"])
    maker = SampleMaker(tokenizer)
    results = Results(study / "measured" / name, writes=True)
    settings = {"seed": maker.seed, "template": maker.template, "tokenizer": tokenizer_fingerprint(tokenizer)}
    fingerprint = model_fingerprint(hf_model)
    if results.models().get(name, fingerprint) != fingerprint:
        print(f"{name} was trained again and is another model now: all of it is measured again", flush=True)
        shutil.rmtree(results.folder)
    results.begin({"settings": settings, "models": {name: fingerprint}})
    results.mend()
    if wanted.get("answers"):
        return _answers_over_training(study, name, Path(model), wanted, results)
    text = study / "corpus" / "held-out-text"
    documents = read_documents([text], tokenizer, wanted["seq_len"])
    questions = Questions(
        tasks=build_tasks(wanted["suites"], wanted["tasks"], Sources(essays=text)),
        lengths=wanted["lengths"],
        samples=wanted["samples"],
        batch=wanted["batch"],
    )
    done = {key for key, _ in results.lines()}
    read = dict(ways(wanted["attention"], named, hf_model.config.num_hidden_layers))
    untrained = Untrained(named, dtype, device, wanted["seq_len"])
    whole: Any = hf_model
    for stage in stages:
        for attention, pattern in ways_of_stage(stage, read).items():
            began = time.perf_counter()
            generator = Generator(whole, tokenizer, pattern=pattern, layout="striped")
            whole = generator.model
            if stage == "text":
                _text(generator, name, attention, documents, wanted, results, done)
                key = Key(name, attention, "index", "untrained", wanted["seq_len"], 0)
                # Dense attention chooses nothing, and a model without a run has no other state.
                if attention != DENSE and named.run is not None and key not in done:
                    tokens = documents[0].tokens[: wanted["seq_len"]]
                    results.add(key, stability(generator, untrained, tokens))
            elif stage == "copy":
                for key in copies(name, attention, wanted["copy"], documents):
                    if key not in done:
                        tokens = documents[key.number].tokens
                        results.add(key, copied(generator, tokens, key.length, wanted["copy"]["span"]))
            else:
                evaluate(generator, name, attention, questions, maker, results, done)
            print(f"{stage}, read {attention}: {time.perf_counter() - began:.1f} s", flush=True)


def _answers_over_training(
    study: Path, name: str, run: Path, wanted: Mapping[str, Any], results: Results
) -> None:
    """Of every checkpoint, how likely each held-out answer is, with its distance (associative.py)."""
    shards = TokenShards(study / "corpus" / "held-out")
    words = Vocabulary(**wanted["answers"])
    done = {key for key, _ in results.lines()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    untrained = Untrained(find_model(str(run)), dtype, device, wanted["seq_len"])
    for checkpoint in CheckpointStore(run).named():
        named = find_model(str(checkpoint))
        step = checkpoint.name.removeprefix("step_").lstrip("0")
        hf_model = named.build(dtype, device)
        whole: Any = hf_model
        for attention, pattern in ways(wanted["attention"], named, hf_model.config.num_hidden_layers):
            generator = Generator(whole, pattern=pattern, layout="striped")
            whole = generator.model
            for number in range(shards.num_documents):
                key = Key(name, attention, "answers", f"step-{step}", wanted["seq_len"], number)
                tokens = shards.document(number).tolist()[: wanted["seq_len"]]
                if key not in done:
                    results.add(key, answered(generator, tokens, words))
                key = Key(name, attention, "index", f"step-{step}", wanted["seq_len"], 0)
                if number == 0 and attention != DENSE and key not in done:
                    results.add(key, stability(generator, untrained, tokens))


def answered(generator: Generator, tokens: Sequence[int], words: Vocabulary) -> dict[str, Any]:
    """Of each answer in a sequence: tokens back to where it was told, and the probability that it was given."""
    found = answers(tokens, words)
    likely = generator.token_nll(tokens).double().neg().exp()
    return {
        "distances": [answer.distance for answer in found],
        "likely": [round(float(likely[answer.position - 1]), 4) for answer in found],
    }


def ways(
    attention: Mapping[str, str], named: NamedModel, layers: int
) -> Iterator[tuple[str, Pattern | Sequence[Pattern]]]:
    """Ways of reading, by name: those of the plan, and the model's own pattern where that is another one."""
    given = {name: parse_attention(text).by_layer(layers) for name, text in attention.items()}
    yield from given.items()
    own = named.patterns(layers)
    if own is not None and own not in given.values() and not all(isinstance(one, Dense) for one in own):
        yield OWN, own


def ways_of_stage(stage: str, read: Mapping[str, Any]) -> dict[str, Any]:
    """The ways of reading that a stage takes: text takes all. What takes longer is read densely and in one sparse way,
    the model's own where it has one."""
    if stage == "text" or OWN not in read:
        return dict(read)
    return {name: pattern for name, pattern in read.items() if name in (DENSE, OWN)}


def _text(
    generator: Generator,
    name: str,
    attention: str,
    documents: Sequence[Document],
    wanted: Mapping[str, Any],
    results: Results,
    done: set[Key],
) -> None:
    for number, document in enumerate(documents):
        key = Key(name, attention, "text", document.name, wanted["seq_len"], number)
        if key in done:
            continue
        results.add(key, read_text(generator, document, wanted["seq_len"], wanted["bucket"]))


@torch.no_grad()
def read_text(generator: Generator, document: Document, length: int, bucket: int) -> dict[str, Any]:
    """Losses by position of a document's first ``length`` tokens, and density and recall by layer."""
    with Observer(recall_rows=128) as observer:
        nll = generator.token_nll(document.tokens[:length])
    return bucketed(nll, bucket, last=1024).record() | {
        "layer_density": [stats.density for stats in observer.stats],
        "layer_recall": [stats.recall for stats in observer.stats],
    }


class Untrained:
    """A run's model before its first step, built when it is first asked for."""

    def __init__(self, named: NamedModel, dtype: str, device: torch.device, seq_len: int) -> None:
        self._build = lambda: replace(named, checkpoint=None).build(dtype, device, seq_len)
        self._model: Any = None

    def reader(self, patterns: Sequence[Pattern]) -> Generator:
        """Reads by these patterns, one a layer."""
        if self._model is None:
            self._model = self._build()
        generator = Generator(self._model, pattern=list(patterns), layout="striped")
        self._model = generator.model
        return generator


def stability(
    generator: Generator, untrained: Untrained, tokens: Sequence[int]
) -> dict[str, list[float | None]]:
    """How much of a text's index a model chose before it was trained, by the same pattern."""
    before = untrained.reader(generator.attention.patterns)
    return shared_by_layer(_indices(generator, tokens), _indices(before, tokens))


@torch.no_grad()
def _indices(generator: Generator, tokens: Sequence[int]) -> list[SparseIndex]:
    with Observer() as observer:
        generator.token_nll(tokens)
    return [stats.index for stats in observer.stats]


def shared_by_layer(now: Sequence[SparseIndex], then: Sequence[SparseIndex]) -> dict[str, list[float | None]]:
    """Of two models' indices of one text, what both have over what either has: by layer, all heads together.

    Returns:
        ``columns`` and ``tiles``: of block diagonals, or of block lists where the pattern has them. None where neither
        model has any.
    """
    found: dict[str, list[float | None]] = {"columns": [], "tiles": []}
    for one, other in zip(now, then, strict=True):
        found["columns"].append(_shared(_columns(one), _columns(other)))
        blocks = [_causal_tiles(index) for index in (one, other)]
        found["tiles"].append(_shared(*blocks))
    return found


def _shared(one: torch.Tensor, other: torch.Tensor) -> float | None:
    either = int((one | other).sum())
    return None if either == 0 else int((one & other).sum()) / either


def _columns(index: SparseIndex) -> torch.Tensor:
    """bool (q_heads, seq_len): columns of the first sequence."""
    there = torch.zeros(
        index.columns.shape[1], index.seq_len + 1, dtype=torch.bool, device=index.columns.device
    )
    return there.scatter_(1, index.columns[0].long(), True)[:, :-1]


def _causal_tiles(index: SparseIndex) -> torch.Tensor:
    """bool: block diagonals of the first sequence (q_heads, blocks), or the tiles of an index that lists blocks
    (q_heads, blocks, blocks)."""
    if index.blocks is None:
        return index.diagonals[0]
    block = torch.arange(index.num_blocks, device=index.diagonals.device)
    return index.tile_mask(block, block)[0]


def copies(
    name: str, attention: str, copy: Mapping[str, Any], documents: Sequence[Document]
) -> Iterator[Key]:
    """Every repetition that is asked for, its gap as the length: of as many documents as there are samples."""
    for gap in copy["gaps"]:
        for number in range(min(copy["samples"], len(documents))):
            yield Key(name, attention, "copy", "copy", gap, number)


def copied(generator: Generator, tokens: Sequence[int], gap: int, span: int) -> dict[str, Any]:
    """Loss of a span of text that stands again ``gap`` tokens after its end, and of its first reading.

    Raises:
        UserError: the text is shorter than the span and the gap.
    """
    if len(tokens) < span + gap:
        raise UserError(
            f"measure.copy.gaps: {gap} is more than the {len(tokens)} tokens of a held-out text hold beside "
            f"measure.copy.span={span}; ask for smaller gaps."
        )
    nll = generator.token_nll([*tokens[: span + gap], *tokens[:span]]).double()
    first, again = nll[CUE - 1 : span - 1], nll[span + gap + CUE - 1 :]
    return {"first": first.mean().item(), "again": again.mean().item(), "tokens": len(again)}


def main() -> int:
    """The command."""
    if len(sys.argv) not in (5, 6):
        print(f"error: {__doc__.splitlines()[2].strip()}", file=sys.stderr)
        return 2
    study, stages, name, model, *more = sys.argv[1:]
    rope = json.loads(more[0]) if more else {}
    try:
        measure(Path(study), stages.split(","), name, model, rope)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
