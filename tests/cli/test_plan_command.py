"""`mtraining plan` on a small model with the rates of an H200: what it prints, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtraining.cli import main
from mtraining.cli.plan import parse_budget
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.pattern import ToeplitzRandom
from mtraining.pattern.base import SequenceShard
from mtraining.predict.measured import built_in
from mtraining.ring import tile_work
from mtraining.ring.balance import by_step

SMALL = ["--model", "tiny", "--seq-len", "8K", "--columns", "64", "--density", "0.3", "--tokens", "1M"]
LINKS = ["--intra", "300GB/s", "--inter", "1GB/s,1ms"]


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """The H200's, as if they had been measured at the small model's head_dim; memory for it alone."""
    given = json.loads(built_in()["h200"].read_text())
    given["attention"]["16"] = given["attention"]["128"]
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(given))
    return path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["mtraining", "plan", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out + said.err


def test_a_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rates: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "layer.svg"
    code, said = run(
        capsys, monkeypatch, *SMALL, *LINKS, "--gpus", "2x2", "--batch", "1", "--rates", str(rates),
        "--picture", str(picture),
    )  # fmt: skip
    assert code == 0, said
    assert "best: parallel: {dp: 1, cp: 4, cp_outer: 2}" in said
    for row in (
        "seconds a step",
        "tokens/s",
        "GPU-hours for 1M tokens",
        "sparse over dense",
        "memory of a GPU",
    ):
        assert row in said
    # What each other choice loses: a flat ring between slow nodes, another layout, recompute, and what is not known.
    assert re.search(r"ring +│ flat .*\+[1-9][\d.]*%", said)
    assert len(re.findall(r"layout +│", said)) == 2 and re.search(r"recompute +│ full .*\+", said)
    assert "copies to host memory were not measured" in said
    assert "--inter is taken at its word" in said and "attention-h200-2026-11-23-2.csv" in said
    assert picture.read_text().lstrip().startswith("<?xml")
    seconds, tokens = (
        float(re.search(rf"{name} +│ ([\d.,]+)", said)[1].replace(",", ""))  # type: ignore[index]
        for name in ("seconds a step", "tokens/s")
    )
    assert tokens == pytest.approx(8192 / seconds, rel=1e-3)


def test_help_names_the_gpus_that_come_with_rates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(built_in()) >= {"h100", "h200"}
    code, said = run(capsys, monkeypatch, "--help")
    assert code == 0 and all(name in said for name in built_in())


@pytest.mark.slow
def test_the_pages_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of docs/scaling.md; with --batch 4 its table too."""
    words = ["--model", "qwen2.5-3b", "--seq-len", "512K", "--gpus", "4x8", "--inter", "25GB/s"]
    code, said = run(capsys, monkeypatch, *words)
    assert code == 0 and "cp_outer" in said, said
    code, said = run(capsys, monkeypatch, *words, "--intra", "300GB/s", "--batch", "4")
    assert "{dp: 4, cp: 8, cp_outer: 1}" in said and re.search(r"tokens/s +│ 511,", said), said
    assert "train.recompute=auto: layers 0-6 keep attention and its products, 7-35 keep" in said
    assert re.search(r"1 x 32, ring 4x8 .*\+16.4%", said) and re.search(r"keep_attention .*\+6.9%", said)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--gpus", "4x8", "--gpu", "a100"], "--gpu a100: no rates of this GPU"),
        (["--gpus", "4x8"], "--inter is missing"),
        (["--gpus", "4by8"], "--gpus: '4by8' is no cluster"),
        (["--gpus", "2x2", "--inter", "fast"], "--inter: 'fast' is no rate"),
        (["--gpus", "2"], "head_dim 16 was not measured"),
        (["--gpus", "2", "--tokens", "many"], "--tokens: 'many'"),
        (["--gpus", "2", "--columns", "8192"], "--columns 8192"),
        (["--gpus", "2", "--run", "nowhere"], "--run: nowhere has no balance.json"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    code, said = run(capsys, monkeypatch, *SMALL, *words)
    assert code == 2 and sentence in said and said.count("\n") == 1


def test_what_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rates: Path
) -> None:
    given = json.loads(rates.read_text())
    rates.write_text(json.dumps(given | {"memory_gib": 1.0}))
    code, said = run(capsys, monkeypatch, *SMALL, "--gpus", "2", "--rates", str(rates))
    assert code == 2 and "no way to spread" in said and "use more GPUs" in said


@pytest.mark.slow
def test_what_fits_with_little_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rates: Path
) -> None:
    """Where nothing leaves enough free, the plan takes what fits and says how much would be enough."""
    given = json.loads(rates.read_text())
    words = [*SMALL, "--seq-len", "512K", "--gpus", "1", "--batch", "1", "--rates", str(rates)]

    def planned(memory: float) -> tuple[int, str]:
        rates.write_text(json.dumps(given | {"memory_gib": memory}))
        return run(capsys, monkeypatch, *words)

    code, said = planned(1.0)
    least = re.search(r"the least needs ([\d.]+) GiB", said)
    assert code == 2 and least
    code, said = planned(float(least[1]) + 0.02)
    enough = re.search(r"to never run short +│ ([\d.]+) GiB", said)
    assert code == 0 and enough and float(enough[1]) > float(least[1]) + 0.05, said
    assert "may run short of memory" in said or "does not fit" in said
    code, said = planned(140.0)
    assert code == 0 and "to never run short" not in said


def test_a_saved_run_s_balance(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rates: Path, tmp_path: Path
) -> None:
    """A run whose index was the planned one gives the planned step; with far more work it takes longer."""
    pattern = ToeplitzRandom(128, density=0.3 - 64 / 8192, columns=64)
    q = torch.empty(1, 1, 4, 1)
    index = pattern.estimate(q, q, SequenceShard.whole(8192), 1.0)

    def seconds(times: float | None) -> str:
        words = [*SMALL, "--gpus", "4", "--batch", "1", "--rates", str(rates)]
        if times is not None:
            work = times * tile_work(index, build_layout("striped", 128), 4)
            entry: dict[str, Any] = {"layout": "striped", "world": 4, "load": by_step(work, 2).tolist()}
            (tmp_path / "balance.json").write_text(json.dumps({"step": 1, "layouts": [entry]}))
            settings = {
                "pattern": {"block_size": 128}, "train": {"seq_len": 8192, "micro_batch_size": 1},
                "parallel": {"dp": 1, "cp": 4, "cp_outer": 2},
            }  # fmt: skip
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
            words += ["--run", str(tmp_path)]
        code, said = run(capsys, monkeypatch, *words)
        assert code == 0, said
        return re.search(r"attention forward +│ ([\d.]+)", said)[1]  # type: ignore[index]

    # The plan may take another layout.
    assert float(seconds(1.0)) == pytest.approx(float(seconds(None)), rel=0.01)
    assert float(seconds(2000.0)) > 20 * float(seconds(1.0))


def test_budgets() -> None:
    assert [parse_budget(text) for text in ("1B", "2.5M", "1000", "1t")] == [1e9, 2.5e6, 1000, 1e12]
    for text in ("", "B", "-1B", "nan", "1e40"):
        with pytest.raises(UserError, match="--tokens"):
            parse_budget(text)
