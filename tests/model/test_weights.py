"""Weights that are not the whole model are refused by name; what a model can do without is not asked for."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DENSE, SEQ_LEN, tiny_batch, tiny_model, tiny_options
from transformers import AutoModelForCausalLM

from mtraining.errors import UserError
from mtraining.model import ModelOptions, build_model, export_model, parallelize
from mtraining.pattern import build_pattern

Edit = Callable[[Path, dict[str, torch.Tensor]], None]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny Llama whose head is its embeddings."""
    folder = tmp_path_factory.mktemp("weights") / "whole"
    tiny_model("llama", "float32").save_pretrained(folder)
    return folder


@pytest.fixture
def edited(whole: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    def edit(change: Edit) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(whole, folder)
        change(folder, load_file(folder / "model.safetensors"))
        return folder

    return edit


def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def rename(rule: Callable[[str], str]) -> Edit:
    return lambda folder, state: write(folder, {rule(name): tensor for name, tensor in state.items()})


def with_tensors(**tensors: torch.Tensor) -> Edit:
    return lambda folder, state: write(
        folder, {**state, **{k.replace("__", "."): v for k, v in tensors.items()}}
    )


def without(part: str) -> Edit:
    return lambda folder, state: write(folder, {name: x for name, x in state.items() if part not in name})


def cut(folder: Path, _: dict[str, torch.Tensor]) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def replaced(data: bytes) -> Edit:
    return lambda folder, _: (folder / "model.safetensors").write_bytes(data) and None


def removed(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()


def adapter(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def shard_missing(folder: Path, _: dict[str, torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    removed(folder, {})
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def torch_file_cut(folder: Path, state: dict[str, torch.Tensor]) -> None:
    removed(folder, {})
    torch.save(state, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def config_with(**fields: Any) -> Edit:
    def edit(folder: Path, _: dict[str, torch.Tensor]) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BAD: dict[str, tuple[Edit, str]] = {
    "a layer missing": (without("layers.1."), r"lacks 9 tensors \(model.layers.1.input_layernorm.weight, .*, \.\.\.\)"),
    "a tensor missing": (without("layers.1.mlp.up"), rf"lacks the tensor {UP} of the model"),
    "embeddings missing": (without("embed_tokens"), r"lacks .*(embed_tokens|lm_head)"),
    "a prefix": (rename(lambda k: f"base_model.model.{k}"), r"set model.weights_prefix=base_model.model. to leave"),
    "other names": (rename(lambda k: k.replace("mlp", "ffn")), r"lacks 6 tensors .*, and holds 6 tensors .*ffn"),
    "too many": (with_tensors(model__layers__7__norm__weight=torch.ones(2)), "holds the tensor model.layers.7.norm"),
    "another shape": (
        with_tensors(**{UP.replace(".", "__"): torch.ones(2, 3)}),
        rf"{UP} has shape \(2, 3\) where its config.json asks for \(64, 48\)",
    ),
    "cut short": (cut, r"model.safetensors is damaged or cut short \(.*\); copy or download it again"),
    "a pointer": (replaced(b"version https://git-lfs.github.com/spec/v1\n"), "model.safetensors is damaged or cut"),
    "empty": (replaced(b""), "model.safetensors is damaged or cut short"),
    "no weights": (removed, "holds no weights"),
    "an adapter": (adapter, "holds an adapter and not a whole model; merge it"),
    "a shard missing": (shard_missing, r"model-00002-of-\d+.safetensors is missing, one of the files that model"),
    "a torch file cut short": (torch_file_cut, "pytorch_model.bin is damaged or cut short"),
    "quantized": (config_with(quantization_config=BITS), r"quantized weights \(quantization_config: bitsandbytes\)"),
    "gptq": (config_with(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized weights"),
    "its own code": (config_with(model_type="own", auto_map={"AutoConfig": "a.B"}), "custom code"),
    "no model type": (lambda folder, _: (folder / "config.json").write_text("{}") and None, "no config that transf"),
    "no JSON": (lambda folder, _: (folder / "config.json").write_text("{oops") and None, "no config that transf"),
    "a field of another type": (config_with(hidden_size="many"), r"\(.*'hidden_size' expected int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_the_whole_model_is_one_sentence(case: str, edited: Any, capfd: Any) -> None:
    change, message = BAD[case]
    folder = edited(change)
    capfd.readouterr()
    with pytest.raises(UserError, match=message) as error:
        build_model(ModelOptions(init=str(folder)), SEQ_LEN)
    assert "\n" not in str(error.value)
    assert not re.search("REPORT|MISSING|UNEXPECTED|MISMATCH", capfd.readouterr().err)  # transformers' tables


def test_a_prefix_can_be_left_away(edited: Any, whole: Path) -> None:
    folder = edited(rename(lambda key: f"base_model.model.{key}"))
    plain, _ = build_model(ModelOptions(init=str(whole)), SEQ_LEN)
    model, _ = build_model(ModelOptions(init=str(folder), weights_prefix="base_model.model."), SEQ_LEN)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(UserError, match=r"model.weights_prefix has no effect with model.init=random"):
        build_model(tiny_options("llama").model_copy(update={"weights_prefix": "x."}), SEQ_LEN)


@pytest.mark.parametrize(
    "change",
    [
        with_tensors(),
        with_tensors(
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)
        ),  # of older transformers
        lambda folder, state: write(
            folder, {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
        ),
        rename(
            lambda key: key.removeprefix("model.")
        ),  # the decoder saved alone, whose head is its embeddings
    ],
)
def test_what_a_model_can_do_without(change: Edit, edited: Any, whole: Path) -> None:
    plain, _ = build_model(ModelOptions(init=str(whole)), SEQ_LEN)
    model, _ = build_model(ModelOptions(init=str(edited(change))), SEQ_LEN)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def head_of_its_own(folder: Path, state: dict[str, torch.Tensor]) -> None:
    write(folder, {**state, "lm_head.weight": state["model.embed_tokens.weight"].flip(0).contiguous()})


def test_a_head_of_its_own_under_a_config_that_ties_it(edited: Any, tmp_path: Path, caplog: Any) -> None:
    """What is loaded, trained and exported is what the config says, and it is told."""
    folder = edited(head_of_its_own)
    with caplog.at_level(logging.WARNING, "mtraining"):
        model, _ = build_model(ModelOptions(init=str(folder)), SEQ_LEN)
    assert "both are kept and trained" in caplog.text
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight.flip(0))
    export_model(parallelize(model, pattern=build_pattern(**DENSE)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight.flip(0))


def test_so_for_a_model_that_was_loaded_elsewhere(edited: Any, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(edited(head_of_its_own))
    assert loaded.config.tie_word_embeddings  # transformers leaves it so
    parallelize(loaded, pattern=build_pattern(**DENSE))
    assert not loaded.config.tie_word_embeddings


def test_an_untied_model_without_its_head(edited: Any) -> None:
    folder = edited(config_with(tie_word_embeddings=False))
    with pytest.raises(
        UserError, match=r"lacks the tensor lm_head.weight .* say tie_word_embeddings=true in"
    ):
        build_model(ModelOptions(init=str(folder)), SEQ_LEN)


def test_dropout_is_the_same_for_a_loaded_and_a_fresh_model(tmp_path: Path) -> None:
    options = tiny_options("gpt_neox", "float32")
    options = options.model_copy(update={"config": {**options.config, "hidden_dropout": 0.5}})
    fresh, _ = build_model(options, SEQ_LEN)
    fresh.save_pretrained(tmp_path)
    loaded, _ = build_model(ModelOptions(init=str(tmp_path)), SEQ_LEN)
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not elsewhere.training
    batch, losses, measured = tiny_batch(), [], []
    for each in (fresh, loaded, elsewhere):
        model = parallelize(each, pattern=build_pattern(**DENSE))
        assert all(module.training for module in model.modules())
        torch.manual_seed(7)
        losses.append(model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels).item())
        first, again = (
            model.token_losses(batch.input_ids, batch.position_ids, batch.labels) for _ in range(2)
        )
        assert torch.equal(first, again)
        measured.append(first.sum().item())
        assert all(module.training for module in model.modules())  # measuring is without dropout, and over
    assert losses[0] == losses[1] == losses[2]
    assert measured[0] == measured[1] == measured[2]
    assert abs(losses[0] - measured[0] / batch.num_labels) > 1e-3
