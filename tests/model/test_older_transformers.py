"""The oldest transformers 4 that reads YaRN as transformers 5 does computes the same logits from an exported folder.

It lives in an environment of its own, made here from the package index; torch is this environment's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DENSE, SEQ_LEN, tiny_batch, tiny_options
from transformers import AutoTokenizer

from mtraining.data import save_byte_tokenizer
from mtraining.model import build_model, export_model, parallelize
from mtraining.pattern import build_pattern

pytestmark = pytest.mark.slow

OLDEST = "transformers==4.51.3"
NEEDS = ["tokenizers==0.21.4", "huggingface_hub==0.36.2", "safetensors<0.7", "regex", "requests", "filelock"]
NEEDS += [
    "fsspec",
    "packaging",
    "pyyaml",
    "tqdm",
    "typing_extensions",
    "certifi",
    "charset-normalizer",
    "idna",
]
NEEDS += ["urllib3"]

NATIVE = {"original_max_position_embeddings": SEQ_LEN // 4}
ROPES: dict[str, dict[str, Any]] = {
    "own": {},
    "theta": {"theta": 5e5},
    "yarn": {"type": "yarn", "factor": 4.0, **NATIVE},
    "yarn_options": {
        "type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, **NATIVE
    },
    "linear": {"type": "linear", "factor": 4.0, **NATIVE},
    "dynamic": {"type": "dynamic", **NATIVE},
}  # fmt: skip
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "glm4")

READER = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__ == sys.argv[2], transformers.__file__
found = {}
for folder in Path(sys.argv[1]).iterdir():
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(expected["tokens"]).logits
    error = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
    same = AutoTokenizer.from_pretrained(folder)(expected["text"]).input_ids == expected["ids"]
    found[folder.name] = [error.item(), same]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its interpreter."""
    home = tmp_path_factory.mktemp("transformers4")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", OLDEST, *NEEDS]
    made = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if made.returncode:
        reason = f"{OLDEST} cannot be installed here: {made.stderr.strip()[-300:]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "zz_torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # after its own packages
    return python


def test_logits_and_tokens_are_the_same(oldest: Path, tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens, text = tiny_batch().input_ids, "Hi <|endoftext|> ü"
    for family in FAMILIES:
        for name, rope in ROPES.items():
            model = build_model(tiny_options(family, "float32", **rope), SEQ_LEN)[0].eval()
            with torch.no_grad():  # so that attention is not uniform, and positions tell
                for key, parameter in model.named_parameters():
                    if "q_proj" in key or "k_proj" in key or "query_key_value" in key:
                        parameter.mul_(12)
                logits = model(tokens).logits
            folder = tmp_path / "exports" / f"{family}-{name}"
            export_model(parallelize(model, pattern=build_pattern(**DENSE)), folder, tokenizer=tokenizer)
            expected = {"tokens": tokens, "logits": logits, "text": text, "ids": tokenizer(text).input_ids}
            torch.save(expected, folder / "expected.pt")
    read = subprocess.run(
        [str(oldest), "-c", READER, str(tmp_path / "exports"), OLDEST.partition("==")[2]],
        capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    assert len(found) == len(FAMILIES) * len(ROPES)
    assert {name: result for name, result in found.items() if result[0] > 1e-5 or not result[1]} == {}, (
        sys.version
    )
