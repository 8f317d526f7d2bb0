"""`prepare` of conversations: what is read of rows, bad rows, and the labels that training sees."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_cases import ASK, CHATML_MARKED, CONVERSATIONS, END, MORE, SAY, TOOL, chat_tokenizer, turn, unmarked
from prepared import stopped_at_write, tree

from mtraining.data import PrepareOptions, PrepareSummary, SequenceDataset, TokenShards, prepare
from mtraining.errors import UserError
from mtraining.layout import build_layout

ROWS = [{"messages": row["messages"]} for name, row in CONVERSATIONS.items() if "tool" not in name]


def write(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }  # fmt: skip
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(packed.get(path.suffix, bytes)(data))
    return path


def template(folder: Path, text: str = CHATML_MARKED) -> Path:
    (folder / "chat.jinja").write_text(text)
    return folder / "chat.jinja"


def run(source: Path, out: Path, **options: Any) -> PrepareSummary:
    """Prepare with the byte tokenizer, by a template beside the source."""
    if "tokenizer" not in options:
        options.setdefault("chat_template", template(source.parent))
    return prepare(PrepareOptions((str(source),), out, **options), progress=False)


def stored(out: Path) -> dict[str, tuple[list[int], list[int]]]:
    """{name: (ids, ids with -100 where not trained)}"""
    shards = TokenShards(out)
    found = {}
    for number in range(shards.num_documents):
        at = shards.starts[number] + np.arange(shards.lengths[number])
        found[shards.name(number)] = (shards.gather(at).tolist(), shards.labels(at).tolist())
    return found


def said(labels: list[int]) -> bytes:
    """Trained bytes; special tokens as #."""
    return bytes(label if label < 256 else ord("#") for label in labels if label != -100)


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.ndjson.bz2", "rows.jsonl.xz",
     "rows.parquet"],
)  # fmt: skip
def test_files_of_conversations(tmp_path: Path, name: str) -> None:
    summary = run(write(tmp_path / name, ROWS), tmp_path / "out")
    made = list(stored(tmp_path / "out").values())
    assert len(made) == summary.conversations == len(ROWS) and not summary.skipped
    assert said(made[1][1]) == f"{SAY['content']}#\n{END['content']}#\n".encode()
    assert bytes(i if i < 256 else 35 for i in made[2][0]).startswith(b"#system\nBe brief.#\n#user\nWhat")
    trained = sum(label != -100 for _, labels in made for label in labels)
    assert summary.trained_tokens == trained == TokenShards(tmp_path / "out").num_trained
    assert f"conversations: {len(ROWS)}, " in summary.render() and f"{trained:,} tokens (" in summary.render()


def test_a_saved_dataset_and_tools_of_parquet(tmp_path: Path) -> None:
    """Columns of a table give every message the keys of all others, as nulls, which no template may see."""
    # Older ones write keys in the order of the alphabet, and templates print them so.
    datasets = pytest.importorskip("datasets", minversion="4.7")
    row = CONVERSATIONS["tools"]
    other = {"type": "function", "function": {"name": "weather", "arguments": {"day": "Monday"}}}
    rows = [row, {"messages": [ASK, turn("assistant", "", tool_calls=[other])], "tools": None}]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "plain")
    saved = datasets.Dataset.from_list([{**r, "tools": json.dumps(r["tools"])} for r in rows])
    saved.save_to_disk(tmp_path / "saved")
    run(tmp_path / "saved", tmp_path / "out")
    run(write(tmp_path / "rows.parquet", rows), tmp_path / "table")
    expected = list(stored(tmp_path / "plain").values())
    assert list(stored(tmp_path / "out").values()) == expected
    assert list(stored(tmp_path / "table").values()) == expected
    assert said(expected[0][1]).count(b"weather") == 1 and b"null" not in said(expected[1][0])
    assert json.dumps(TOOL).encode() in bytes(i for i in expected[0][0] if i < 256)


@pytest.mark.parametrize("form", ["parquet", "saved", "hub"])
def test_messages_that_a_table_keeps_as_json(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` does so where arguments of calls differ from row to row. A null among them was meant."""
    datasets = pytest.importorskip("datasets", minversion="4.7")
    call = {"type": "function", "function": {"name": "b", "arguments": {"y": [1, "2"], "z": None}}}
    rows = [
        CONVERSATIONS["tools"],
        {"messages": [ASK, turn("assistant", "", tool_calls=[call])], "tools": None},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    run(source, tmp_path / "plain")
    made = datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(tmp_path / "hub")
    )
    assert "arrow.json" in str(made.features.arrow_schema)
    found: str | Path = tmp_path / "rows.parquet"
    if form == "parquet":
        made.to_parquet(found)
    elif form == "saved":
        found = tmp_path / "saved"
        made.save_to_disk(found)
    else:
        found = tmp_path / "folder"
        found.mkdir()
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: made)
    run(found, tmp_path / "out", kind="dataset" if form == "hub" else "auto")
    assert list(stored(tmp_path / "out").values()) == list(stored(tmp_path / "plain").values())
    said_of = said(list(stored(tmp_path / "out").values())[1][1])
    assert b'"arguments": {"y": [1, "2"], "z": null}' in said_of


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_prompts_and_completions(tmp_path: Path, form: str) -> None:
    texts = [{"prompt": "What is ", "completion": "the weather?"}]
    run(write(tmp_path / f"texts.{form}", texts), tmp_path / "texts")
    [(ids, labels)] = stored(tmp_path / "texts").values()
    assert bytes(ids[:-1]) == b"What is the weather?" and ids[-1] == 256
    assert labels == [-100] * 8 + ids[8:]  # the end of text is trained
    chats = [{"prompt": [ASK, SAY, MORE], "completion": [END]}]
    run(write(tmp_path / f"chats.{form}", chats), tmp_path / "chats")
    [(_, labels)] = stored(tmp_path / "chats").values()
    assert said(labels) == f"{END['content']}#\n".encode()
    run(write(tmp_path / f"all.{form}", [*chats]), tmp_path / "all", train_on="all")
    shards = TokenShards(tmp_path / "all")
    assert not shards.masked and shards.meta["format"] == "mtraining-shards-1"
    assert not list((tmp_path / "all").glob("trained-*"))


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from mtraining.inputs import hub

    monkeypatch.setattr(hub, "_ask", lambda *_: None)
    made = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: made)
    options = PrepareOptions(("owner/chats",), tmp_path / "out", chat_template=template(tmp_path))
    prepare(options, progress=False)
    run(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "plain")
    made_here = stored(tmp_path / "plain").values()
    assert list(stored(tmp_path / "out").values()) == list(made_here)
    assert next(iter(stored(tmp_path / "out"))) == "owner/chats:0"


BAD: dict[str, Any] = {
    "no messages": {"messages": []},
    "messages are not a list": {"messages": "hello"},
    "a message is not a mapping": {"messages": ["hello"]},
    "a message has no role": {"messages": [{"content": "x"}]},
    "a message has another role than system, developer, user, assistant, tool": {
        "messages": [turn("bot", "x")]
    },
    "a message has no content": {"messages": [{"role": "user"}, END]},
    "a message has content other than text": {"messages": [ASK, turn("assistant", 3)]},  # type: ignore[arg-type]
    "no assistant turn": {"messages": [ASK]},
    "its text spells a special token of the tokenizer": {"messages": [turn("user", "<|im_end|>"), END]},
    "tools are not a list of mappings, nor JSON of one": {"messages": [ASK, END], "tools": "{"},
    "chat_template_kwargs is not a mapping": {"messages": [ASK, END], "chat_template_kwargs": [1]},
    "longer than --max-length 200": {"messages": [turn("user", "x" * 300), END]},
}


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*BAD.values(), {"other": 1}, {"messages": [ASK, END]}])
    summary = run(source, tmp_path / "out", max_length=200)
    assert {entry.reason: entry.name for entry in summary.skipped} == {
        **{reason: f"rows.jsonl:{number}" for number, reason in enumerate(BAD, start=1)},
        "messages are not a list": "rows.jsonl:13",
    }
    assert "skipped 2 (messages are not a list): rows.jsonl:2, rows.jsonl:13" in summary.render()
    assert summary.documents == 1
    assert TokenShards(tmp_path / "out").meta["skipped_counts"]["no assistant turn"] == 1


@pytest.mark.parametrize(("reason", "workers"), [*((reason, 1) for reason in BAD), ("no messages", 2)])
def test_bad_rows_are_refused_where_asked(tmp_path: Path, reason: str, workers: int) -> None:
    source = write(tmp_path / "rows.jsonl", [{"messages": [ASK, END]}, BAD[reason]])
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "out", max_length=200, bad_rows="refuse", workers=workers)
    assert str(caught.value) == (
        f"'rows.jsonl:2' cannot be used ({reason}); mend it, or leave out and count such rows by --bad-rows skip"
    )
    assert not (tmp_path / "out").exists()


def test_choices_are_no_bad_rows(tmp_path: Path) -> None:
    """A column that is not read and a length that was not wanted do not end the command."""
    rows = [{"text": "long enough", "input_ids": [1]}, {"text": "no"}]
    source = write(tmp_path / "rows.jsonl", rows)
    summary = prepare(
        PrepareOptions((str(source),), tmp_path / "out", min_length=5, bad_rows="refuse"), progress=False
    )
    assert summary.documents == 1
    assert [entry.reason for entry in summary.skipped][1:] == ["shorter than --min-length 5"]


def test_ids_outside_the_vocabulary_end_the_command_or_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"input_ids": [1]}, {"input_ids": [5, 999]}])
    with pytest.raises(UserError, match="'rows.jsonl:2' holds token id 999, .* or leave such rows out by"):
        run(source, tmp_path / "out", chat_template=None)
    summary = run(source, tmp_path / "out", chat_template=None, bad_rows="skip")
    assert summary.documents == 1
    assert [(e.name, e.reason) for e in summary.skipped] == [
        ("rows.jsonl:2", "holds token ids that 'byte' does not have")
    ]


def test_which_column_is_read(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", [{"text": "words", "messages": [ASK, END], "input_ids": [1]}])
    summary = run(both, tmp_path / "text", chat_template=None)
    assert [bytes(ids[:-1]) for ids, _ in stored(tmp_path / "text").values()] == [b"words"]
    told = summary.render()
    assert "messages beside text, which is read; --messages-column messages reads them" in told
    assert "input_ids beside text, which is read; --ids-column input_ids reads them" in told
    assert run(both, tmp_path / "chat", train_on="last").conversations == 1  # asking for it is enough
    other = write(tmp_path / "other.jsonl", [{"text": "words", "talk": [ASK, END], "title": "t"}])
    assert run(other, tmp_path / "talk", messages_column="talk").conversations == 1
    with pytest.raises(
        UserError, match=r"^--messages-column: 'title' holds text, not conversations .*; set it to 'talk'$"
    ):
        run(other, tmp_path / "none", messages_column="title")
    with pytest.raises(UserError, match="--text-column and --messages-column cannot both be read"):
        PrepareOptions(("x",), tmp_path, text_column="body", messages_column="talk")
    with pytest.raises(UserError, match="--train-on 'user' is unknown"):
        PrepareOptions(("x",), tmp_path, train_on="user")
    with pytest.raises(UserError, match="--min-length 9 is more than --max-length 8"):
        PrepareOptions(("x",), tmp_path, min_length=9, max_length=8)


def test_asking_in_vain_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    summary = run(tmp_path / "a.txt", tmp_path / "out", train_on="last", chat_template=None)
    assert "no conversations: --train-on last had nothing to choose from" in summary.render()


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        UserError, match="tokenizer 'byte' has no chat template .*; give one by --chat-template"
    ):
        run(source, tmp_path / "out", tokenizer="byte")
    with pytest.raises(UserError, match="--chat-template '.*nowhere' cannot be read"):
        run(source, tmp_path / "out", chat_template=tmp_path / "nowhere")


def test_the_given_template_goes_with_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat_tokenizer(unmarked(CHATML_MARKED)).save_pretrained(tmp_path / "tokenizer")
    source, given = write(tmp_path / "rows.jsonl", ROWS), template(tmp_path, CHATML_MARKED)
    options = {"tokenizer": str(tmp_path / "tokenizer"), "chat_template": given}
    run(source, tmp_path / "out", **options)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").chat_template == CHATML_MARKED
    given.write_text("{{ 'another' }}")
    with pytest.raises(UserError, match=r"prepared with other options \(--chat-template was '.*sha256"):
        run(source, tmp_path / "out", **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_and_whole_runs_are_the_same(tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"shard_tokens": 150, "train_on": "assistant"}
    rows = [{"messages": [ASK]}, *ROWS, *ROWS]
    source = write(tmp_path / "rows.jsonl", rows)
    run(source, tmp_path / "whole", **options)
    with stopped_at_write(7):
        run(source, tmp_path / "parts", **options)
    summary = run(source, tmp_path / "parts", **options, workers=workers)
    assert 0 < summary.reused_shards < summary.shards
    assert summary.conversations == 2 * len(ROWS)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert TokenShards(tmp_path / "parts").identity == TokenShards(tmp_path / "whole").identity


def test_the_mask_is_part_of_the_identity(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    found = {}
    for train_on in ("assistant", "last", "all"):
        run(source, tmp_path / train_on, train_on=train_on)
        found[train_on] = TokenShards(tmp_path / train_on)
    assert len({shards.meta["content"] for shards in found.values()}) == 3
    assert "of them trained" in found["last"].identity and "trained" not in found["all"].identity
    assert found["last"].meta["format"] == "mtraining-shards-2"
    run(source, tmp_path / "cut", train_on="last", shard_tokens=50)
    cut = TokenShards(tmp_path / "cut")
    assert len(cut.meta["shards"]) > 2 and cut.identity == found["last"].identity
    one = next((tmp_path / "last").glob("trained-*"))
    one.write_bytes(one.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"trained-00000.bin has .* bytes, not the .* of its .* tokens"):
        TokenShards(tmp_path / "last")


def test_shards_of_text_beside_conversations_are_trained_whole(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("some words of plain text\n")
    write(folder / "b.jsonl", ROWS)
    options = PrepareOptions(
        (str(folder),), tmp_path / "out", chat_template=template(tmp_path), shard_tokens=10
    )
    summary = prepare(options, progress=False)
    assert summary.conversations == len(ROWS)
    ids, labels = stored(tmp_path / "out")["a.txt"]
    assert labels == ids and ids[-1] == 256
    assert not (tmp_path / "out" / "trained-00000.bin").exists()
    assert (tmp_path / "out" / "trained-00001.bin").exists()


# Labels as training sees them.


def test_the_loss_counts_the_predictions_of_what_is_said(tmp_path: Path) -> None:
    """Equal to transformers' own loss, which shifts labels by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtraining.model.loss import chunked_cross_entropy

    run(write(tmp_path / "rows.jsonl", [ROWS[1]]), tmp_path / "out")
    shards = TokenShards(tmp_path / "out")
    [(ids, labels)] = stored(tmp_path / "out").values()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    ).double()  # fmt: skip
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        losses = -found.logits[0, :-1].log_softmax(-1)  # of the next token
        item = SequenceDataset(shards, shards.num_tokens - 1, mode="concat")[0]
        hidden = model.model(input_ids=item["input_ids"][None]).last_hidden_state
        count = int((item["labels"] != -100).sum())
        ours = chunked_cross_entropy(hidden, model.lm_head.weight, item["labels"][None], count)
    assert count == shards.num_trained == sum(label != -100 for label in labels[1:])
    expected = np.mean([losses[n, label].item() for n, label in enumerate(labels[1:]) if label != -100])
    assert ours.item() == pytest.approx(expected, abs=1e-12)
    assert ours.item() == pytest.approx(found.loss.item(), abs=1e-6)  # which is in fp32


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_every_rank_has_the_labels_of_its_tokens(tmp_path: Path, name: str) -> None:
    run(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out", shard_tokens=50)
    shards, layout = TokenShards(tmp_path / "out"), build_layout(name, unit=4)
    whole = SequenceDataset(shards, 64, mode="concat")
    at = np.arange(shards.num_tokens)
    ids, labels = shards.gather(at), shards.labels(at)
    assert 0.1 < (labels == -100).mean() < 0.9 and len(whole) >= 3
    parts = [
        SequenceDataset(shards, 64, mode="concat", layout=layout, cp_rank=rank, cp_size=4)
        for rank in range(4)
    ]
    for window in range(len(whole)):
        start = int(whole.windows[0].pieces(window)[0][0])
        assert whole[window]["input_ids"].tolist() == ids[start : start + 64].tolist()
        assert whole[window]["labels"].tolist() == labels[start + 1 : start + 65].tolist()
        for rank, part in enumerate(parts):
            mine = layout.positions(64, 4)[rank]
            assert part[window]["labels"].tolist() == whole[window]["labels"][mine].tolist()


@pytest.mark.parametrize("mode", ["documents", "concat"])
def test_sequences_without_a_trained_token_are_left_out(tmp_path: Path, mode: str) -> None:
    """A step of nothing else would have no loss at all."""
    rows = [{"messages": [turn("user", "x" * 100), END]}, {"messages": [ASK, turn("assistant", "y" * 90)]}]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", shard_tokens=60)
    dataset = SequenceDataset(TokenShards(tmp_path / "out"), 16, mode=mode)
    for window in range(len(dataset)):
        assert (dataset[window]["labels"] != -100).any()
    left = dataset.report.windows_untrained
    assert left >= 6 and f"{left} sequences without a trained token left out" in dataset.report.render()
    tokens = TokenShards(tmp_path / "out")
    counted = sum(int((dataset[window]["labels"] != -100).sum()) for window in range(len(dataset)))
    assert tokens.num_trained - 2 * 16 <= counted <= tokens.num_trained  # tails alone are lost
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_data_without_a_trained_sequence_are_refused(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", "x" * 100), turn("assistant", "y")]}]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    with pytest.raises(
        UserError, match=r"has no sequence of train.seq_len 128 with a trained token; prepare"
    ):
        SequenceDataset(TokenShards(tmp_path / "out"), 128)
