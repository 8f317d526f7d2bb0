"""A user's first steps, by the interpreter of an environment that has the package and torch, and no folder of ours.

Text is prepared and a tiny model trained for two steps by the commands; `parallelize` computes gradients from Python.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = Path(sys.executable).with_name("mtraining")
RUN = """
output: run
model:
  init: random
  config: {model_type: qwen2, vocab_size: 260, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2}
data: {path: shards}
pattern: {name: vertical_slash, block_size: 16}
layout: {name: striped, unit: 16}
train: {seq_len: 256, steps: 2, batch_size: 2, micro_batch_size: 1, lr: 1.0e-2}
distributed: {device: cpu}
"""
PYTHON = """
import torch, mtraining
from transformers import Qwen2Config, Qwen2ForCausalLM
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2))
ids = torch.randint(260, (1, 257))
lm = mtraining.parallelize(model, pattern="dense")
lm(ids[:, :-1], torch.arange(256)[None], labels=ids[:, 1:], num_labels=256).backward()
assert all(parameter.grad is not None for parameter in model.parameters())
"""


def run(*command: object, folder: Path) -> None:
    words = [str(word) for word in command]
    print("+", *(word if "\n" not in word else "..." for word in words), flush=True)
    subprocess.run(words, cwd=folder, check=True)


def main() -> None:
    found = importlib.util.find_spec("mtraining")
    assert found and found.origin and "site-packages" in found.origin, f"not installed: {found}"
    for other in ("pytest", "hypothesis", "mypy"):
        assert importlib.util.find_spec(other) is None, f"{other} hides what the package does not ask for"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        (folder / "text" / "count.txt").write_text(" ".join(map(str, range(3000))), encoding="utf-8")
        (folder / "run.yaml").write_text(RUN, encoding="utf-8")
        run(COMMAND, "--help", folder=folder)
        run(COMMAND, "--version", folder=folder)
        run(COMMAND, "prepare", "text", "shards", folder=folder)
        run(COMMAND, "train", "run.yaml", folder=folder)
        assert (folder / "run" / "export" / "model.safetensors").exists()
        run(sys.executable, "-c", PYTHON, folder=folder)


if __name__ == "__main__":
    main()
