"""An exported folder is an ordinary Hugging Face model: same logits, new rope and context in its config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import BLOCK, DENSE, EVERY_FAMILY, SEQ_LEN, tiny_batch, tiny_model, tiny_options
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import build_model, export_model, parallelize
from mtraining.model.export import _add_older_keys
from mtraining.pattern import build_pattern

LINEAR = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": SEQ_LEN // 4}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": SEQ_LEN // 4}


def train_and_export(worker: Worker, family: str, topology: str | None, folder: Path) -> torch.Tensor:
    """Job: one optimizer step, then export; returns this rank's hidden states after the step."""
    mesh = worker.mesh(*TOPOLOGIES[topology]) if topology else None
    layout = build_layout("striped", BLOCK)
    hf_model = build_model(tiny_options(family, "float32", **YARN), SEQ_LEN)[0]
    model = parallelize(hf_model, mesh, pattern=build_pattern(**DENSE), layout=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tiny_batch()
    inputs = take(batch, layout, mesh) if mesh else (batch.input_ids, batch.position_ids, batch.labels)
    model(*inputs, batch.num_labels).backward()
    optimizer.step()
    export_model(model, folder)
    assert (folder / "config.json").exists()  # on every rank: nobody runs ahead of the writer
    return model.hidden_states(*inputs[:2])


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_comes_back_through_transformers(family: str, tmp_path: Path) -> None:
    """Experts are stored one by one and computed as one tensor."""
    model = tiny_model(family, "float32").eval()
    export_model(
        parallelize(tiny_model(family, "float32"), pattern=build_pattern(**DENSE)), tmp_path / "model"
    )
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for each in (model, plain):
        each.set_attn_implementation("eager")
    tokens = tiny_batch().input_ids
    assert torch.equal(plain(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("family", "topology"), [("qwen2", None), ("qwen2", "cp2"), ("llama", "dp2xcp2")])
def test_plain_transformers_loads_the_same_model(
    pool: ProcessPool, tmp_path: Path, family: str, topology: str | None
) -> None:
    world = {None: 1, "cp2": 2, "dp2xcp2": 4}[topology]
    hidden = pool.run(
        train_and_export, world=world, family=family, topology=topology, folder=tmp_path / "model"
    )
    cp = 1 if topology is None else 2
    layout = build_layout("striped", BLOCK)
    ours = torch.cat([layout.unshard(hidden[start : start + cp]) for start in range(0, world, cp)])
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs = plain.model(tiny_batch().input_ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    trained = plain.lm_head.weight - tiny_model(family, "float32").lm_head.weight
    assert trained.abs().max() > 5e-3  # the step is in the export
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == SEQ_LEN
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["factor"] == 4.0
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # as transformers 4 reads it
    assert config["rope_scaling"] == {
        key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"
    }
    assert config["architectures"] == [type(plain).__name__]
    assert "mtraining" not in json.dumps(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing temporary stays


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def test_logits_dtype_and_tokenizer(tmp_path: Path) -> None:
    expected = tiny_model("llama", "float32")
    model = parallelize(tiny_model("llama", "float32"))
    export_model(model, tmp_path / "full", tokenizer=tokenizer())
    export_model(model, tmp_path / "half", dtype=torch.bfloat16)
    full, half = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("full", "half"))
    tokens = tiny_batch().input_ids
    assert torch.equal(full(tokens).logits, expected(tokens).logits)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, expected.lm_head.weight.to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(tmp_path / "full").convert_tokens_to_ids("b") == 1
    saved = json.loads((tmp_path / "full" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # whose newer name transformers 4 refuses
    assert model.hf_model.dtype == torch.float32  # the training model is left alone


@pytest.fixture(scope="module")
def llama() -> Any:
    return parallelize(tiny_model("llama", "float32"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_earlier_export_is_replaced_and_what_lies_beside_it_stays(llama: Any, tmp_path: Path) -> None:
    target = tmp_path / "model"
    export_model(llama, target, tokenizer=tokenizer())
    alone = contents(target)
    listed = json.loads(alone["mtraining_export.json"])["files"]
    assert sorted(listed) == sorted(alone.keys() - {"mtraining_export.json"})
    (target / "README.md").write_text("mine")
    (target / "evals").mkdir()
    (target / "evals" / "scores.json").write_text("[1]")
    export_model(llama, target, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
    after = contents(target)
    assert after["README.md"] == b"mine" and after["evals/scores.json"] == b"[1]"
    assert "tokenizer.json" not in after  # the earlier export's, and this one has none
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_empty_folder_and_a_link_to_one_are_taken(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export_model(llama, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").exists()


@pytest.mark.parametrize("name", ["config.json", "chapter.txt", "model.safetensors"])
def test_what_no_export_wrote_is_not_touched(name: str, llama: Any, tmp_path: Path) -> None:
    """A folder with a config.json may be anything: a model that somebody trained elsewhere, a web site."""
    (tmp_path / name).write_text("{}")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"is not empty and no export wrote it .*; choose a new or empty folder"
    ):
        export_model(llama, tmp_path)
    with pytest.raises(UserError, match=r"is a file; choose a folder"):
        export_model(llama, tmp_path / name)
    assert contents(tmp_path) == before


def test_a_users_file_of_the_same_name_is_not_replaced(llama: Any, tmp_path: Path) -> None:
    export_model(llama, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"model/tokenizer.json was not written by an export and would be replaced"
    ):
        export_model(llama, tmp_path / "model", tokenizer=tokenizer())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "mark", ["", "[]", '{"files": ["../chapter.txt"]}', '{"files": ["/etc/x"]}', '{"files": [3]}']
)
def test_a_mark_that_leads_out_of_the_folder_is_refused(mark: str, llama: Any, tmp_path: Path) -> None:
    export_model(llama, tmp_path / "model")
    (tmp_path / "chapter.txt").write_text("dear")
    (tmp_path / "model" / "mtraining_export.json").write_text(mark)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"mtraining_export.json is damaged"):
        export_model(llama, tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("steps", range(11))
def test_an_interrupted_replacement_is_no_model_and_is_mended(steps: int, llama: Any, tmp_path: Path) -> None:
    """After any number of steps: renamed and removed files."""
    target = tmp_path / "model"
    export_model(llama, target, tokenizer=tokenizer())
    (target / "README.md").write_text("mine")
    before = contents(target)
    left = iter(range(steps))

    def interrupted(real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(*args, **kwargs)

        return step

    with (
        mock.patch("os.replace", interrupted(os.replace)),
        mock.patch.object(Path, "unlink", interrupted(Path.unlink)),
        pytest.raises(KeyboardInterrupt),
    ):
        export_model(llama, target, dtype=torch.bfloat16)
    files = contents(target)
    if "config.json" in files:  # all of the earlier one, or all of the new one but the shorter list
        whole = {name: data for name, data in files.items() if not name.startswith("mtraining_export.json")}
        earlier = {name: data for name, data in before.items() if name != "mtraining_export.json"}
        assert whole == earlier or len(files["model.safetensors"]) < len(before["model.safetensors"])
    export_model(llama, target)
    AutoModelForCausalLM.from_pretrained(target)
    assert (target / "README.md").read_text() == "mine"
    assert "tokenizer.json" not in contents(target)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_says(umask: int, llama: Any, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        export_model(llama, tmp_path / "model", tokenizer=tokenizer())
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("rope", [{}, YARN, LINEAR], ids=["own", "yarn", "linear"])
def test_older_keys_say_the_same_to_transformers_5(family: str, rope: Any, tmp_path: Path) -> None:
    """With both spellings in a file, transformers 5 builds its settings from the older ones."""
    if family == "phi3" and rope:
        pytest.skip("transformers knows no scaling for it")
    config = build_model(tiny_options(family, "float32", **rope), SEQ_LEN, "meta")[0].config
    config.save_pretrained(tmp_path)
    expected = AutoConfig.from_pretrained(tmp_path).rope_parameters
    _add_older_keys(tmp_path / "config.json", config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == expected == config.rope_parameters
    if "full_attention" in config.rope_parameters:
        assert not {"rope_theta", "rope_scaling"} & written.keys(), (
            "older keys cannot differ by type of layer"
        )
        return
    theta = written["rotary_emb_base" if family == "gpt_neox" else "rope_theta"]
    assert theta == config.rope_parameters["rope_theta"]
    assert (written["rope_scaling"] or {"rope_type": "default"})["rope_type"] == config.rope_parameters[
        "rope_type"
    ]
    only_older = {key: value for key, value in written.items() if key != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(only_older))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == expected


def test_a_failed_export_keeps_the_earlier_one(tmp_path: Path) -> None:
    model = parallelize(tiny_model("llama", "float32"))
    export_model(model, tmp_path / "model")
    with (
        mock.patch.object(
            type(model.hf_model), "save_pretrained", side_effect=OSError(28, "No space left on device")
        ),
        pytest.raises(UserError, match=r"writing .*model failed .*No space left on device.*free space"),
    ):
        export_model(model, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
