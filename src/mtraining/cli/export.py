"""`mtraining export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A checkpoint, by name or path, or best; default: the newest.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as trained.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a LoRA run: the whole model, with the adapter in its weights.")
    ] = False,
) -> None:
    """Write a checkpoint of RUN as a Hugging Face model in OUT (safetensors, config, tokenizer).

    Of a run with model.lora OUT is the adapter's folder, unless --merge is given.
    """
    from mtraining.train.export import export_run

    source = export_run(run, out, checkpoint=checkpoint, dtype=dtype, merge=merge)
    typer.echo(f"wrote {out} from {source}")
