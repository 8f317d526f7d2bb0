"""Measure one trained model: losses of held-out text by position, tasks, and copying, under each way of reading.

    python recipes/study/measure.py STUDY NAME MODEL [ROPE]

`STUDY/measure.yaml` says what. A line of `STUDY/measured/NAME/results.jsonl` is written when a sample ends, so the same
command goes on where it was stopped. The index of the first held-out document is kept beside it (indices-*.npz), for
how much of it is the same in another model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from associative import answers

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

OWN = "own"  # reading by the pattern that the model was trained with
CUE = 16  # first tokens of a repeated span, from which the model learns that it is one


def measure(study: Path, name: str, model: str, rope: Mapping[str, Any]) -> None:
    """Do what of ``measure.yaml`` is not done yet of one model.

    Args:
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
    hf_model = named.build("bfloat16" if device.type == "cuda" else "float32", device, wanted["seq_len"])
    maker = SampleMaker(tokenizer)
    results = Results(study / "measured" / name, writes=True)
    settings = {"seed": maker.seed, "template": maker.template, "tokenizer": tokenizer_fingerprint(tokenizer)}
    results.begin({"settings": settings, "models": {name: model_fingerprint(hf_model)}})
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
    whole: Any = hf_model
    # What is quick comes first, under every way of reading: time may run out.
    for stage in ("text", "copy", "tasks"):
        for attention, pattern in read.items():
            began = time.perf_counter()
            generator = Generator(whole, tokenizer, pattern=pattern, layout="striped")
            whole = generator.model
            if stage == "text":
                _text(generator, name, attention, documents, wanted, results, done)
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
    done = {key for key, _ in results.lines()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for checkpoint in CheckpointStore(run).named():
        named = find_model(str(checkpoint))
        step = checkpoint.name.removeprefix("step_").lstrip("0")
        hf_model = named.build("bfloat16" if device.type == "cuda" else "float32", device)
        whole: Any = hf_model
        for attention, pattern in ways(wanted["attention"], named, hf_model.config.num_hidden_layers):
            generator = Generator(whole, pattern=pattern, layout="striped")
            whole = generator.model
            for number in range(shards.num_documents):
                key = Key(name, attention, "answers", f"step-{step}", wanted["seq_len"], number)
                if key not in done:
                    results.add(
                        key, answered(generator, shards.document(number).tolist()[: wanted["seq_len"]])
                    )


def answered(generator: Generator, tokens: Sequence[int]) -> dict[str, Any]:
    """Of each answer in a sequence: tokens back to where it was told, and the probability that it was given."""
    found = answers(tokens)
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
        record, indices = read_text(generator, document, wanted["seq_len"], wanted["bucket"])
        if number == 0:
            keep_indices(results.folder / f"indices-{attention}.npz", indices)
        results.add(key, record)


@torch.no_grad()
def read_text(
    generator: Generator, document: Document, length: int, bucket: int
) -> tuple[dict[str, Any], list[SparseIndex]]:
    """Losses by position of a document's first ``length`` tokens, density and recall by layer; and the indices."""
    with Observer(recall_rows=128) as observer:
        nll = generator.token_nll(document.tokens[:length])
    record = bucketed(nll, bucket, last=1024).record()
    return record | {
        "layer_density": [stats.density for stats in observer.stats],
        "layer_recall": [stats.recall for stats in observer.stats],
    }, [stats.index for stats in observer.stats]


def keep_indices(path: Path, indices: Sequence[SparseIndex]) -> None:
    """Write which block diagonals and columns each layer and head chose; nothing of patterns that list blocks."""
    if any(index.blocks is not None for index in indices):
        return
    arrays = {}
    for layer, index in enumerate(indices):
        arrays[f"diagonals_{layer}"] = np.packbits(index.diagonals[0].cpu().numpy(), axis=-1)
        arrays[f"columns_{layer}"] = index.columns[0].cpu().numpy().astype(np.int32)
    np.savez_compressed(path, **arrays)


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
    if len(sys.argv) not in (4, 5):
        print(f"error: {__doc__.splitlines()[2].strip()}", file=sys.stderr)
        return 2
    rope = json.loads(sys.argv[4]) if len(sys.argv) == 5 else {}
    try:
        measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3], rope)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
