"""A run small enough to repeat by the dozen: 256 tokens, blocks of 16, two layers of width 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from distributed import Worker
from mtraining.data import PrepareOptions, prepare
from mtraining.train.config import Config, parse_config
from mtraining.train.loop import train
from mtraining.train.metrics import read_metrics

SEQ_LEN = 256
# Bytes of the held-out documents; a stored document has its end-of-text token behind it.
UNSEEN = (9, 900, 300, 700)


def make_data(folder: Path) -> Path:
    """Token shards of three documents, 700 to 1,900 bytes of counting, enough for 12 sequences."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate((700, 1300, 1900)):
        text = " ".join(str((number + 1) * count) for count in range(length))[:length]
        (folder / f"count{number}.txt").write_text(text, encoding="utf-8")
    prepare(PrepareOptions(sources=(str(folder),), out=folder / "shards", kind="text"), progress=False)
    return folder / "shards"


def make_unseen(folder: Path) -> Path:
    """Held-out token shards: document number n of `UNSEEN` counts in threes from 7 n on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate(UNSEEN):
        text = " ".join(str(7 * number + 3 * count) for count in range(length))[:length]
        (folder / f"unseen{number}.txt").write_text(text, encoding="utf-8")
    prepare(PrepareOptions(sources=(str(folder),), out=folder / "shards", kind="text"), progress=False)
    return folder / "shards"


def evaluated(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among the records of a run, without what the clock says."""
    clock = ("evaluation_seconds", "memory")
    return [
        {key: value for key, value in record.items() if key not in clock}
        for record in records
        if "evaluation" in record
    ]


def raw_config(output: Path, data: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The mapping of a tiny run; each keyword updates one section."""
    raw: dict[str, Any] = {
        "output": str(output),
        "model": {
            "init": "random",
            "config": {
                "model_type": "qwen2",
                "vocab_size": 260,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        },
        "data": {"path": str(data)},
        "pattern": {
            "name": "vertical_slash",
            "block_size": 16,
            "top_p": 0.8,
            "window": 8,
            "sinks": 4,
            "probe": 16,
        },
        "layout": {"name": "striped", "unit": 16},
        "parallel": {"dp": 1, "cp": 1},
        "train": {
            "seq_len": SEQ_LEN,
            "steps": 6,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": 1e-2,
            "warmup_steps": 1,
        },
        "checkpoint": {"every": 3, "keep_last": 2, "export": False},
        "log": {"every": 3, "trackers": []},
        "distributed": {"device": "cpu", "timeout_seconds": 30},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


def tiny_config(output: Path, data: Path, **sections: dict[str, Any]) -> Config:
    """The same, checked."""
    return parse_config(raw_config(output, data, **sections))


def run_job(worker: Worker, raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Train in the pool; every rank returns the run's metrics."""
    result = train(parse_config(raw))
    return read_metrics(result.run)


def tensors(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, unsharded, by its path in the state."""
    dcp_to_torch_save(checkpoint, scratch)
    leaves = torch.utils._pytree.tree_flatten_with_path(torch.load(scratch, weights_only=False))[0]
    return {str(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def differing(one: Path, other: Path, scratch: Path) -> list[str]:
    """The tensors that are not the same in two checkpoints."""
    expected, found = tensors(one, scratch / "expected.pt"), tensors(other, scratch / "found.pt")
    assert len(expected) > 60  # parameters and two moments each
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]
