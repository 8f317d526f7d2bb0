"""Files that somebody sent run nobody's code: what docs/trust.md promises, each with a file that tries."""

import io
import json
import os
import pickle
import pickletools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import raw_config, tiny_config

import mtraining.train.loop as loop
from mtraining.data import PrepareOptions, TokenShards, prepare
from mtraining.errors import UserError
from mtraining.model import ModelOptions, build_model
from mtraining.train.config import load_config, parse_config
from mtraining.train.export import export_run
from mtraining.train.reader import ALLOWED, SafeReader
from mtraining.train.store import CheckpointStore


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "code-ran"
    yield path
    assert not path.exists(), "the file's code was run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of two steps, its checkpoint without digests, as checkpoints once were: nothing else stops its files."""
    run = tmp_path_factory.mktemp("sent") / "run"
    loop.train(tiny_config(run, shards, train={"steps": 2}, checkpoint={"every": 2}))
    file = CheckpointStore(run).path(2) / "manifest.json"
    raw = json.loads(file.read_text())
    old = {key: raw[key] for key in ("step", "world", "shapes", "tiles")}
    order = ("train.seq_len", "train.batch_size", "train.seed", "data.mode")
    old["data"] = {key: raw["options"][key] for key in order}
    old["files"] = {name: record["bytes"] for name, record in raw["files"].items()}
    file.write_text(json.dumps(old))
    return run


@pytest.fixture
def sent(trained: Path, tmp_path: Path) -> Path:
    """A run folder as somebody might send it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def forge(run: Path, name: str, data: bytes) -> None:
    """Put another file in a checkpoint's, and its size in the manifest."""
    path = CheckpointStore(run).path(2)
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = len(data)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_metadata_that_runs_code(sent: Path, shards: Path, mark: Path) -> None:
    forge(sent, ".metadata", pickle.dumps(Evil(mark)))
    with pytest.raises(
        UserError, match=r"asks to run posix.system \(in .metadata\), which no checkpoint needs"
    ):
        loop.train(tiny_config(sent, shards, train={"steps": 3}))
    with pytest.raises(UserError, match=r"^checkpoint \S+ asks to run posix.system \(in .metadata\)"):
        export_run(sent, sent / "out")


def test_metadata_with_code_amid_true_entries(sent: Path, shards: Path, mark: Path) -> None:
    metadata = SafeReader(str(CheckpointStore(sent).path(2))).read_metadata()
    metadata.planner_data = [Evil(mark)]
    forge(sent, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"asks to run posix.system"):
        loop.train(tiny_config(sent, shards, train={"steps": 3}))


@pytest.mark.parametrize("name", ["model.hf_model.model.norm.weight", "optimizer.param_groups.0.eps"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_among_the_tensors(sent: Path, shards: Path, mark: Path, name: str, legacy: bool) -> None:
    """A tensor, or a number of the optimizer, that is read from a pickle of somebody's at the end of the file."""
    path = CheckpointStore(sent).path(2)
    stored, evil = (path / "__0_0.distcp").read_bytes(), io.BytesIO()
    torch.save(Evil(mark), evil, _use_new_zipfile_serialization=not legacy)
    metadata = SafeReader(str(path)).read_metadata()
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            object.__setattr__(info, "offset", len(stored))
            object.__setattr__(info, "length", len(evil.getvalue()))
    forge(sent, ".metadata", pickle.dumps(metadata))
    forge(sent, "__0_0.distcp", stored + evil.getvalue())
    with pytest.raises(UserError, match=r"asks to run posix.system \(in a tensor file\)"):
        loop.train(tiny_config(sent, shards, train={"steps": 3}))
    if name.startswith("model."):
        with pytest.raises(UserError, match=r"asks to run posix.system"):
            export_run(sent, sent / "out")


def test_a_file_outside_the_checkpoint(sent: Path, shards: Path) -> None:
    metadata = SafeReader(str(CheckpointStore(sent).path(2))).read_metadata()
    for info in metadata.storage_data.values():
        object.__setattr__(info, "relative_path", "../../../secret")
    forge(sent, ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"names a file outside its folder, ../../../secret"):
        loop.train(tiny_config(sent, shards, train={"steps": 3}))


def test_metadata_that_is_damaged_is_one_sentence(sent: Path, shards: Path) -> None:
    for data in (b"", b"no pickle", pickle.dumps({"a": 1})):
        forge(sent, ".metadata", data)
        with pytest.raises(UserError, match=r"its .metadata is damaged \(.*\); resume from another one.$"):
            loop.train(tiny_config(sent, shards, train={"steps": 3}))


def test_what_is_allowed_is_what_a_checkpoint_names(sent: Path) -> None:
    """Nothing more than needed, but for what other versions of Python and torch write in its place."""
    data = (CheckpointStore(sent).path(2) / ".metadata").read_bytes()
    text = {arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)}
    needless = {name for names in ALLOWED.values() for name in names} - text
    dtypes = {str(kind)[6:] for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
    paths = {"Path", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
    assert needless - dtypes - paths == {"OrderedDict"}


def custom_code(folder: Path, mark: Path) -> Path:
    """A model folder whose configuration, model and tokenizer are classes of its own file."""
    folder.mkdir()
    classes = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n")
    return folder


def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask in a terminal, and run the code of who says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = custom_code(tmp_path / "model", mark)
    with pytest.raises(UserError, match="model.init="):
        build_model(ModelOptions(init=str(folder)), 64)


def test_a_tokenizer_with_code_of_its_own(
    tmp_path: Path, shards: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = custom_code(tmp_path / "model", mark)
    raw = raw_config(tmp_path / "run", shards)
    raw["model"]["tokenizer"] = str(folder)
    with pytest.raises(UserError, match="model.tokenizer="):
        loop.train(parse_config(raw))
    (tmp_path / "a.txt").write_text("text")
    sources = (str(tmp_path / "a.txt"),)
    options = PrepareOptions(sources=sources, out=tmp_path / "out", tokenizer=str(folder))
    with pytest.raises(UserError, match="cannot be loaded"):
        prepare(options, progress=False)


def test_pickled_weights_that_run_code(tmp_path: Path, shards: Path, mark: Path) -> None:
    from transformers import AutoConfig

    fields = raw_config(tmp_path, shards)["model"]["config"]
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(tmp_path / "model")
    torch.save({"model.norm.weight": Evil(mark)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights|unpickl|global"):
        build_model(ModelOptions(init=str(tmp_path / "model")), 64)


def test_yaml_that_names_code(tmp_path: Path, shards: Path, mark: Path) -> None:
    evil = f"!!python/object/apply:os.system ['touch {mark}']"
    (tmp_path / "run.yaml").write_text(f"output: {evil}\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "good.yaml").write_text("output: x\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(tmp_path / "good.yaml", [f"train.steps={evil}"])
    (tmp_path / "table.yaml").write_text(f"layers: {evil}\n")
    with pytest.raises(UserError, match="pattern.table|table"):
        loop.train(tiny_config(tmp_path / "run", shards, pattern={"table": str(tmp_path / "table.yaml")}))


def copied_shards(shards: Path, to: Path, **meta: Any) -> Path:
    to.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    (to / "meta.json").write_text(json.dumps({**json.loads((shards / "meta.json").read_text()), **meta}))
    return to


def test_pickled_offsets_of_prepared_data(shards: Path, tmp_path: Path, mark: Path) -> None:
    folder = copied_shards(shards, tmp_path / "shards")
    np.save(folder / "offsets-00000.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="offsets-00000.npy cannot be read"):
        TokenShards(folder)


def test_tokens_that_claim_to_be_objects(shards: Path, tmp_path: Path) -> None:
    """As pointers, bytes of a file would crash the process or worse."""
    for dtype in ("|O", "O8", "<f8"):
        with pytest.raises(UserError, match=r"damaged meta.json \(ValueError: dtype is"):
            TokenShards(copied_shards(shards, tmp_path / f"shards{dtype[1:]}", dtype=dtype))
