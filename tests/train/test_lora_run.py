"""A run with `model.lora`: what is saved, how it goes on, what it exports, and which weights it stands on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import raw_config, run_job, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import mtraining.train.loop as loop
from distributed import ProcessPool, Worker
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.model import build_model
from mtraining.model.adapters import transformers_names_allowed
from mtraining.train import checks
from mtraining.train.export import export_run
from mtraining.train.frozen import frozen_weights
from mtraining.train.memory_report import predict_config
from mtraining.train.metrics import read_metrics
from mtraining.train.named import find_model
from mtraining.train.reader import SafeReader
from mtraining.train.store import CheckpointStore, read_manifest

peft = pytest.importorskip("peft")

LORA = {"lora": {"r": 4, "also_train": ["embed_tokens", "norm"], "dropout": 0.1}}
TOKENS = torch.arange(60).reshape(2, 30) + 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: ProcessPool, shards: Path) -> Path:
    """Six steps on cp 2, with checkpoints after steps 3 and 6, and the export of the last."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    raw = raw_config(folder, shards, model=LORA, parallel={"cp": 2}, checkpoint={"export": True})
    pool.run(run_job, world=2, raw=raw)
    return folder


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def base(shards: Path) -> Any:
    """The model that the run began with."""
    config = tiny_config(Path("unused"), shards)
    return build_model(config.model, config.train.seq_len)[0]


def test_a_checkpoint_has_what_is_trained_and_the_run_learns(run: Path) -> None:
    names = SafeReader(str(CheckpointStore(run).path(6))).read_metadata().state_dict_metadata
    weights = {name.removeprefix("model.hf_model.") for name in names if name.startswith("model.hf_model.")}
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in weights
    assert "model.embed_tokens.weight" in weights and "model.norm.weight" in weights
    assert not any("base_layer" in name for name in weights)
    moments = {name for name in names if name.endswith(".exp_avg")}
    assert len(moments) == len(weights - {"lm_head.weight"})  # the tied head is the embeddings
    assert losses(run)[5] < losses(run)[0]


def test_resume_is_bit_for_bit(run: Path, tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(CheckpointStore(folder).path(6))
    pool.run(run_job, world=2, raw=raw_config(folder, shards, model=LORA, parallel={"cp": 2}))
    assert losses(folder) == losses(run)


def moved_job(worker: Worker, raw: dict[str, Any]) -> list[float]:
    run_job(worker, raw)
    return losses(Path(raw["output"]))


def test_another_grid_goes_on_from_it(run: Path, tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    """Dropout draws otherwise there, so steps are only nearly the same."""
    folder = Path(shutil.copytree(run, tmp_path / "dp"))
    shutil.rmtree(CheckpointStore(folder).path(6))
    grid = {"parallel": {"dp": 2}, "checkpoint": {"export": False}}
    found = pool.run(moved_job, world=2, raw=raw_config(folder, shards, model=LORA, **grid))[0]
    assert found == pytest.approx(losses(run), rel=2e-2) and found[:3] == losses(run)[:3]


def test_the_adapter_and_the_merged_model_are_the_same(run: Path, shards: Path, tmp_path: Path) -> None:
    with transformers_names_allowed():
        adapted = peft.PeftModel.from_pretrained(base(shards), run / "export").eval()
    expected = adapted(TOKENS).logits
    assert not torch.allclose(expected, base(shards).eval()(TOKENS).logits, atol=0.05)
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "whole"), "--merge"])
    assert result.exit_code == 0, result.output
    whole, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(whole(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoConfig.from_pretrained(run / "export").max_position_embeddings == 256
    named = find_model(str(run)).build("float32", torch.device("cpu")).eval()
    torch.testing.assert_close(named(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    export_run(run, tmp_path / "adapter", checkpoint="step_00000006")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= files
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "export" / "adapter_model.safetensors"
    ).read_bytes()


def test_merging_a_run_without_adapters_is_refused(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path, shards).to_yaml())
    with pytest.raises(UserError, match="--merge: .* without model.lora"):
        export_run(tmp_path, tmp_path / "out", merge=True)


def test_other_weights_under_the_adapter_are_refused(run: Path, tmp_path: Path, shards: Path) -> None:
    """A base that was trained on meanwhile has the same shapes and the same config."""
    folder = Path(shutil.copytree(run, tmp_path / "moved"))
    model = base(shards)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01
    model.save_pretrained(tmp_path / "base")
    new = {"model": {**LORA, "init": str(tmp_path / "base")}, "checkpoint": {"export": False}}
    with pytest.raises(
        UserError, match=r"model.init: weights \w+ -> weights \w+; .*checkpoint.allow=\[model.init\]"
    ):
        loop.train(tiny_config(folder, shards, train={"steps": 7}, **new))
    new["checkpoint"] = {"export": False, "allow": ["model.init"]}
    loop.train(tiny_config(folder, shards, train={"steps": 7}, **new))
    assert len(losses(folder)) == 7


@pytest.mark.parametrize("option", [{"r": 8}, {"alpha": 3.0}, {"targets": ["q_proj"]}, {"rslora": True}])
def test_another_adapter_is_refused(run: Path, shards: Path, option: dict[str, Any]) -> None:
    lora = {**LORA["lora"], **option}
    with pytest.raises(
        UserError,
        match=f"is of another run: model.lora.{next(iter(option))}: ",
    ):
        loop.train(tiny_config(run, shards, model={"lora": lora}))


def sharded_fingerprint(worker: Worker, raw: dict[str, Any]) -> str:
    from mtraining.train.config import parse_config
    from mtraining.train.mesh import joined_processes

    config = parse_config(raw)
    with joined_processes(config) as process:
        return frozen_weights(loop.parallel_model(config, process), process)


def test_the_fingerprint_does_not_depend_on_ranks_or_dtype(
    pool: ProcessPool, run: Path, shards: Path
) -> None:
    from mtraining.model.adapters import open_adapter

    found = {read_manifest(CheckpointStore(run).path(6)).frozen}
    for world in (1, 2):
        raw = raw_config(run, shards, model=LORA, parallel={"dp": world})
        found |= {*pool.run(sharded_fingerprint, world=world, raw=raw)}
    coarse = tiny_config(run, shards, model={**LORA, "dtype": "bfloat16"}).model
    found.add(frozen_weights(open_adapter(build_model(coarse, 256)[0])[0]))
    assert len(found) == 1 and found != {""}
    assert frozen_weights(base(shards)) == ""


def test_the_fingerprint_sees_every_weight_in_its_place() -> None:
    layer = torch.nn.Linear(6, 4).requires_grad_(False)
    before = frozen_weights(layer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))  # the same numbers elsewhere
    swapped = frozen_weights(layer)
    layer.bias.requires_grad_(True)
    assert len({before, swapped, frozen_weights(layer)}) == 3


def test_without_peft_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft; run: pip install 'mtraining\[lora\]'"):
        checks.check_config(tiny_config(tmp_path, shards, model=LORA))


def test_memory_counts_what_is_trained(shards: Path, tmp_path: Path) -> None:
    full = predict_config(tiny_config(tmp_path, shards))
    lora = predict_config(tiny_config(tmp_path, shards, model={"lora": {"r": 4}}))
    model = base(shards)
    stored = 4 * sum(p.numel() for p in model.parameters())
    assert full.moments["in the optimizer"] == 4 * stored
    linear = [m for name, m in model.named_modules() if name.endswith("_proj")]
    added = 4 * sum(4 * (m.in_features + m.out_features) for m in linear)
    assert lora.moments["in the optimizer"] == stored + 4 * added
