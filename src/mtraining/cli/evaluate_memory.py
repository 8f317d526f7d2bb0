"""`mtraining evaluate --dry-run`: what each model under each attention takes of a GPU at the longest length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtraining.cli.dry_run import show_memory
from mtraining.cli.on_ring import rope_options

if TYPE_CHECKING:
    from mtraining.cli.evaluate import Request

DOCUMENTS = ("ppl", "words", "recall")
"""Suites that read text of the user's own, as a whole and one after another."""


def show_prediction(request: Request, memory_gib: float | None) -> None:
    """Print a table for each model and attention, of the suite that takes most. Needs no weights and no GPU.

    Raises:
        UserError: a length beyond a model's positions, or what does not fit.
    """
    from mtraining.cli.evaluate import check_positions
    from mtraining.generate import parse_attention
    from mtraining.layout import build_layout
    from mtraining.predict.reading import ReadingWork, predict_reading
    from mtraining.sizes import tokens_text
    from mtraining.train.named import find_model

    shown = []
    for name in request.models:
        named = find_model(name, rope_options(request.rope), request.tokenizer)
        hf_model = named.shapes(request.needed)
        check_positions(request, hf_model.config)
        layers = hf_model.config.num_hidden_layers
        for choice in map(parse_attention, request.attentions):
            found = {
                suite: predict_reading(
                    ReadingWork(
                        hf_model, request.processes.ring, lengths, new_tokens,
                        choice.by_layer(layers, named.patterns(layers)), build_layout(choice.layout),
                        request.processes.predicted_dtype, scored=suite in ("ppl", "words"),
                    )
                )
                for suite, lengths, new_tokens in _readings(request)
            }  # fmt: skip
            most = max(found, key=lambda suite: found[suite].peak)
            where = f"{request.processes.shown}, {tokens_text(max(request.lengths))} tokens"
            shown.append((f"{name}, {choice.text}: {most}, {where}", found[most]))
    show_memory(shown, memory_gib)


def _readings(request: Request) -> Iterator[tuple[str, list[int], int]]:
    """(suite, prompts read together, new tokens at most) of everything asked for, at the longest length."""
    length, rows = max(request.lengths), min(request.batch, request.samples)
    for task in request.answered():
        new_tokens = task.answer_tokens(length)
        if new_tokens < length:
            yield f"{task.suite} {task.name}", [length - new_tokens] * rows, new_tokens
    for suite in DOCUMENTS:
        if suite in request.suites:
            yield suite, [length], 0
    for name in request.harness:
        # What the harness asks is known to the harness alone: prompts of the whole length, answered by a few tokens.
        yield f"lm-eval {name}", [length] * rows, 1
