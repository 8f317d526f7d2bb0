"""An exported folder is an ordinary Hugging Face model: same logits, new rope and context in its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import BLOCK, DENSE, EVERY_FAMILY, SEQ_LEN, tiny_batch, tiny_model, tiny_options
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import build_model, export_model, parallelize
from mtraining.pattern import build_pattern

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
    assert model.hf_model.dtype == torch.float32  # the training model is left alone


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    model = parallelize(tiny_model("llama", "float32"))
    export_model(model, tmp_path / "model")
    export_model(model, tmp_path / "model", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no exported model; choose another folder"):
        export_model(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "dear"


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
