"""A tiny run of Trainer: its model, data, arguments and what is compared, for plain Trainer and for ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainingArguments

from mtraining.layout import build_layout
from mtraining.pattern import build_pattern

BLOCK = 8
LENGTHS = (64, 50, 61, 33, 64, 47, 58, 64, 40, 64, 55, 62)


WINDOW = {
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 19,
}
"""Settings of a model whose first layer has a window."""


def model(tied: bool = False, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(
            Qwen2Config(
                vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, use_cache=False,
                **settings,
            )
        )  # fmt: skip


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    """Sequences of uneven lengths, with uneven shares of labels."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[: number * 2] = -100
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    longest = max(len(one["input_ids"]) for one in batch)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([one[key] + [value] * (longest - len(one[key])) for one in batch])

    mask = [[1] * len(one["input_ids"]) + [0] * (longest - len(one["input_ids"])) for one in batch]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def arguments(output: Path, batch: int, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
    }
    return TrainingArguments(**{**given, **options})


def curves(trainer: Trainer) -> dict[str, list[float]]:
    """What is logged at each step."""
    keys = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return {key: [log[key] for log in trainer.state.log_history if key in log] for key in keys}


DENSE = {"pattern": build_pattern("dense", block_size=BLOCK), "layout": build_layout("striped", BLOCK)}


@contextmanager
def launched(rank: int, world: int) -> Iterator[None]:
    """The environment that torchrun gives to a process; accelerate forgets it afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    os.environ |= {key: str(value) for key, value in given.items()}
    try:
        yield
    finally:
        for key in given:
            os.environ.pop(key, None)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
