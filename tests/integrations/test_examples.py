"""Every file in examples/ under torchrun with two processes: losses are those of plain loops on one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEPS, LENGTH = 3, 256
pytestmark = pytest.mark.slow


def torchrun(name: str, *options: str) -> str:
    """What a file of examples/ prints on two processes."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, str(EXAMPLES / name), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tiny(vocab: int = 256) -> Any:
    """The model that the examples make without --model."""
    sizes = {"vocab_size": vocab, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads))


def logged(folder: Path) -> list[float]:
    """Losses as Trainer keeps them, to the last digit."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_every_example_has_a_test() -> None:
    tested = set(re.findall(r'torchrun\(\s*"(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_own_loop(tmp_path: Path) -> None:
    assert len((EXAMPLES / "own_loop.py").read_text().splitlines()) <= 60
    given = [
        "--pattern",
        "dense",
        "--steps",
        str(STEPS),
        "--seq-len",
        str(LENGTH),
        "--out",
        str(tmp_path / "model"),
    ]
    printed = torchrun("own_loop.py", *given)
    found = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]

    torch.manual_seed(0)
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected = []
    for _ in range(STEPS):
        tokens = torch.randint(256, (1, LENGTH + 1))
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == STEPS
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(saved.lm_head.weight, model.lm_head.weight, rtol=1e-4, atol=1e-5)


trainer_of_today = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="Trainer's methods had other names"
)


@trainer_of_today
def test_hf_trainer(tmp_path: Path) -> None:
    given = [
        "--pattern",
        "dense",
        "--steps",
        str(STEPS),
        "--seq-len",
        str(LENGTH),
        "--out",
        str(tmp_path / "ours"),
    ]
    torchrun("hf_trainer.py", *given)

    set_seed(0)
    model = tiny()
    rows = torch.randint(256, (8, LENGTH)).tolist()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"), max_steps=STEPS, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, learning_rate=1e-3, use_cpu=True, logging_steps=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()
    assert logged(tmp_path / "ours") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(saved.lm_head.weight, model.lm_head.weight, rtol=1e-4, atol=1e-5)


def words(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("?#0123456789 ")}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="?", eos_token="#", pad_token="?")
    made.save_pretrained(folder)
    return made


@trainer_of_today
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL, about names in transformers
@pytest.mark.parametrize(
    "lora",
    [pytest.param(False, marks=pytest.mark.sweep, id="all weights"), pytest.param(True, id="adapters")],
)
def test_trl_sft(lora: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = words(tmp_path / "tokenizer")
    given = ["--pattern", "dense", "--steps", str(STEPS), "--out", str(tmp_path / "ours")]
    given += ["--tokenizer", str(tmp_path / "tokenizer"), *(["--lora"] if lora else [])]
    torchrun("trl_sft.py", *given)

    set_seed(0)
    rows = [
        {"prompt": " ".join(map(str, range(number))), "completion": " " + str(number) * (40 + number)}
        for number in range(20, 28)
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "plain"), max_steps=STEPS, max_length=512, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, learning_rate=1e-3, use_cpu=True, bf16=False, logging_steps=1,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    SFTTrainer(
        tiny(len(tokenizer)), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
    ).train()  # fmt: skip
    found, expected = logged(tmp_path / "ours"), logged(tmp_path / "plain")
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == STEPS
    assert (tmp_path / "ours" / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
