"""`mtraining calibrate` without a model or text of anybody's: a configuration's architecture, and prepared tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mtraining.bench.attention import price
from mtraining.bench.timing import Timing
from mtraining.cli.calibrate import calibrate as command
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import UserError
from mtraining.evaluate import capture
from mtraining.model import build_model, parallelize
from mtraining.model.windows import band
from mtraining.pattern import PerHead, load_table
from mtraining.train.config import load_config

MODEL = {
    "model_type": "qwen2", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Python's own source as bytes, prepared."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "text.txt").write_text(
        Path(torch.__file__).with_name("functional.py").read_text("utf-8")[:4000]
    )
    prepare(PrepareOptions(sources=(str(source),), out=tmp_path / "tokens", tokenizer="byte"), progress=False)
    return tmp_path / "tokens"


@pytest.fixture
def configuration(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: object) -> Path:
        path = tmp_path / "run.yaml"
        rope = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 256}
        model = {"init": "random", "config": MODEL | changes, "rope": rope}
        path.write_text(
            yaml.safe_dump(
                {
                    "output": "runs/x",
                    "model": model,
                    "data": {"path": "none"},
                    "train": {"seq_len": 256, "steps": 1},
                }
            )
        )
        return path

    return write


def test_an_architecture_alone_on_prepared_tokens(
    tokens: Path, configuration: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Longer than the model's own context, at prices of the kernel, and no mask of all pairs is ever made."""
    times = iter([1.0, 2.0, 3.0, 6.0])  # of tiles forward and backward, of columns
    monkeypatch.setattr(price, "measure", lambda run, device: Timing(next(times), None))
    seen = []

    def exact(module, q, k, v, mask, **rest):  # type: ignore[no-untyped-def]
        seen.append((q.shape, mask))
        return sdpa(module, q, k, v, mask, **rest)

    sdpa = capture.sdpa_attention_forward
    monkeypatch.setattr(capture, "sdpa_attention_forward", exact)
    out = tmp_path / "table.yaml"
    command(
        str(configuration()),
        tokens,
        out=out,
        tokens=1024,
        rows=32,
        block_size=32,
        density=0.8,
        cost="kernel",
        chart=False,
    )
    layers = load_table(out)
    assert [len(layer.heads) for layer in layers if isinstance(layer, PerHead)] == [4, 4]
    assert seen == [((1, 4, 1024, 16), None)] * 2
    about = yaml.safe_load(out.read_text())["about"]
    assert about["column_price"] > 1 and about["expected_cost"] > about["expected_density"]
    assert f"costs {about['column_price']:.2f} times one of a tile here" in capsys.readouterr().out


def test_layers_with_windows_are_not_searched(
    tokens: Path, configuration: Callable[..., Path], tmp_path: Path
) -> None:
    """The table has what they have, so that a run of the same model takes it."""
    out, windowed = (
        tmp_path / "table.yaml",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    )
    path = str(configuration(**windowed))
    command(path, tokens, out=out, tokens=1024, rows=32, block_size=32, density=0.8, chart=False)
    full, window = load_table(out)
    assert isinstance(full, PerHead) and len(full.heads) == 4
    assert window == band(40, 32)
    model = build_model(load_config(path).model, 256)[0]
    parallelize(model, layer_patterns={0: full, 1: window})
    with pytest.raises(UserError, match="every layer of .* has a window, so there is no pattern to choose"):
        command(str(configuration(**windowed | {"max_window_layers": 0})), tokens, out=out, tokens=1024)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"samples": 9}, "DATA: .* holds .* tokens, fewer than --samples 9 x --tokens 1024"),
        ({"vocab_size": 99}, {}, "DATA: .* has token .*, beyond the 99 of"),
        ({}, {"cost": "time"}, "--cost time is not known; use auto, area or kernel"),
        ({}, {"device": "tpu"}, "--device tpu is not known; use auto, cpu or cuda"),
    ],
)
def test_what_does_not_fit_is_refused(
    tokens: Path, configuration: Callable[..., Path], changes: dict[str, int], options: dict[str, object], words: str
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=words):
        command(str(configuration(**changes)), tokens, **{"tokens": 1024} | options)  # type: ignore[arg-type]


def test_text_needs_a_tokenizer(configuration: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(UserError, match="has no tokenizer to read DATA with; .* mtraining prepare made"):
        command(str(configuration()), tmp_path / "text.txt", tokens=1024)
