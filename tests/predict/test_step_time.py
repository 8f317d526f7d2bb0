"""Predicted seconds against every committed measurement of rings and training steps on GPUs that come with rates.

The rates come from kernel timings and from one profiled step (``sources`` in the rates file), not from the measurements
that are compared with. Exceptions are listed below, each with its reason.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mtraining.bench.train.cases import SHAPES, TrainCase
from mtraining.bench.train.model import build_model
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model.recompute import PARTS, LayerPolicy, layer_policies
from mtraining.pattern import ToeplitzRandom
from mtraining.predict.measured import Link, Rates, built_in, rates_of, rates_of_device, read_rates
from mtraining.predict.recompute import _WORDS, policies_text
from mtraining.predict.ring import Network
from mtraining.predict.step_time import (
    ModelShape,
    Setting,
    attention_passes,
    one_machine,
    shard_seconds,
    step_time,
)
from mtraining.predict.work import Index, LayerWork
from mtraining.ring import imbalance, tile_work

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WITHIN = 0.10
# Commits whose attention kernels were slower than those that the rates are of (10.25 ms then, 7.72 ms now, at 128K on
# one GPU). Predictions are 20 to 30 % below, and must stay so: they show that a change of a kernel is seen.
OLDER_KERNELS = {"52e229c"}
# Single passes further off than 10 %, although forward and backward together are within.
# 128K on one GPU: 23 ms of backward run before power limits the clock, which the rates' warmed-up kernels had reached.
# 512K on two GPUs: backward's rate falls with length (475 TFLOP/s at 128K, 462 at 512K), and rates have one length.
PASSES_OFF = {(1, 131072, "backward"): 0.11, (2, 524288, "backward"): -0.11}
# Steps further off than 10 %. On two H100 the predictions of 256K tokens are 9 and 10 % too fast. Tiles, products and
# links were timed on a warm board, and ranks waited for keys in 1.2 % of the ring's time. Such steps run at the limit
# of power, at 1440 of 1980 MHz. No rate has shortages of memory, once or twice a step, which those of 304b272, b85288b
# and 244fe15 had.
STEPS_OFF = {
    ("ea8c751", 262144): -0.101,
    ("304b272", 262144): -0.117,
    ("304b272", 524288): -0.100,
    ("b85288b", 262144): -0.103,
    ("244fe15", 262144): -0.116,
}
RINGS = "ring-h200x2-2026-11-23.csv"
STEPS = (
    "train-h200x2-2026-11-23.csv",
    "train-h100x2-2026-11-27.csv",
    "train-h100x2-2026-11-27-2594bd1.csv",
    "train-h100x2-2026-11-27-ea8c751.csv",
    "train-h100x2-2026-11-27-2-ea8c751.csv",
    "train-h100x2-2026-11-27-304b272.csv",
    "train-h100x2-2026-11-27-b85288b.csv",
    "train-h100x2-2026-11-28-244fe15.csv",
    "train-h100x2-2026-11-28-1157c4e.csv",
    "train-h100x2-2026-11-28-tensorwise.csv",
    "train-h100x4-2026-11-27.csv",
    "train-h100x4-2026-11-27-b85288b.csv",
    "train-h100x4-2026-11-27-ea8c751.csv",
    "train-h100x4-2026-11-28-244fe15.csv",
    "transfers-h100x2-2026-11-27.csv",
)
PROFILES = "profile-h200-2026-11-23.csv"
RING_PROFILE = "profile-h100x2-2026-11-28.csv"
PACKED = "packed-steps-h100-80gb-hbm3-2026-11-27.csv"
# Single linear layers in float8, which no rate is of.
LINEAR = {"float8-layers-h100-2026-11-27.csv", "float8-layers-h100-2026-11-28.csv"}
TELEMETRY = "telemetry-cost-h100-80gb-hbm3-2026-11-27.csv"


def rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rates_for(row: dict[str, str]) -> Rates:
    """Of the GPU that a row was measured on."""
    rates = rates_of_device(row["gpu"])
    assert rates is not None, row["gpu"]
    return rates


def ring_cases() -> list[Any]:
    return [pytest.param(row, id=f"{row['commit']}-{row['gpus']}x-{row['seq_len']}") for row in rows(RINGS)]


def ring_milliseconds(row: dict[str, str]) -> list[float]:
    gpus, tokens, rates = int(row["gpus"]), int(row["seq_len"]), rates_for(row)
    pattern = ToeplitzRandom(density=float(row["density"]), columns=int(row["columns"]))
    work = LayerWork.of(Index.prescribed(pattern, tokens, 16), build_layout("striped", 128), gpus, 16, 2, 128)
    return [1000 * one.seconds for one in attention_passes(work, 1, rates, one_machine(rates, gpus))]


@pytest.mark.parametrize("row", ring_cases())
def test_measured_rings(row: dict[str, str]) -> None:
    found = ring_milliseconds(row)
    measured = [float(row["forward_ms"]), float(row["backward_ms"])]
    if row["commit"] in OLDER_KERNELS:
        assert -0.35 < sum(found) / sum(measured) - 1 < -0.2
        return
    assert sum(found) == pytest.approx(sum(measured), rel=WITHIN)
    for phase, mine, theirs in zip(("forward", "backward"), found, measured, strict=True):
        off = mine / theirs - 1
        listed = PASSES_OFF.get((int(row["gpus"]), int(row["seq_len"]), phase))
        assert off == pytest.approx(listed, abs=0.01) if listed else abs(off) < WITHIN


def kept(told: str | None) -> tuple[LayerPolicy, ...] | None:
    """What each layer kept, from the words of `policies_text`."""
    if not told:
        return None
    found: list[LayerPolicy] = []
    for first, last, what in re.findall(r"(\d+)(?:-(\d+))? keeps? (.+?)(?=, \d|$)", told):
        parts = frozenset(part for part, word in _WORDS.items() if word in what)
        found += [LayerPolicy(parts, everything=what == "everything")] * (int(last or first) + 1 - int(first))
    assert policies_text(found) == told
    return tuple(found)


def step_row(row: dict[str, str]) -> float:
    rates = rates_for(row)
    tokens, gpus, layers = int(row["seq_len"]), int(row["gpus"]), int(row["layers"])
    shape = SHAPES["qwen2.5-3b"]
    density = None if row["pattern"] == "dense" else round(float(row["density"]), 3)
    case = TrainCase(shape, tokens, density, row.get("layout", "striped"), "flat", row["recompute"], layers)
    index = (
        Index.all_tiles(tokens)
        if density is None
        else Index.prescribed(case.pattern(estimate=False), tokens, shape.heads)
    )
    model = ModelShape.of(build_model(shape, tokens, layers, torch.device("meta")))
    setting = Setting(
        1,
        gpus,
        1,
        build_layout(case.layout, 128),
        row["recompute"],
        False,
        row["fused"],
        kept(row.get("kept")),
    )
    return step_time(model, index, setting, rates, one_machine(rates, gpus)).seconds


@pytest.mark.parametrize(
    ("file", "row"),
    [
        pytest.param(
            file, row, id=f"{row['commit']}-{row['layers']}-{row['seq_len']}-{row['layout']}-{row['pattern']}"
        )
        for file in STEPS
        for row in rows(file)
        # In one file no column says what `auto` chose. Rates of products in float8 are not measured.
        if (row["recompute"] != "auto" or row.get("kept")) and row.get("float8", "off") == "off"
    ],
)
def test_measured_steps(file: str, row: dict[str, str]) -> None:
    """Two and four GPUs, 4 to 36 layers, dense and sparse, three layouts. Not one rate comes from these files."""
    off = step_row(row) / float(row["step_seconds"]) - 1
    listed = STEPS_OFF.get((row["commit"], int(row["seq_len"])))
    assert off == pytest.approx(listed, abs=0.01) if listed else abs(off) < WITHIN


@pytest.mark.parametrize("fused", ["none", "liger", "compile"])
def test_measured_profiles(fused: str) -> None:
    """One GPU, 128K. The rates of what surrounds attention are from here, those of attention are not."""
    profiled([row for row in rows(PROFILES) if row["fused"] == fused])


def test_a_measured_profile_of_two_gpus() -> None:
    profiled(rows(RING_PROFILE))


def profiled(mine: list[dict[str, str]]) -> None:
    (step,) = (float(row["ms"]) for row in mine if row["component"] == "step")
    assert 1000 * step_row(mine[0]) == pytest.approx(step, rel=WITHIN)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['case']}-{row['equal']}")
        for row in rows(PACKED)
        # Packed at the same density, documents compute less than the prescribed index's window has.
        if row["case"] == "one document" or row["equal"] == "area"
    ],
)
def test_measured_packed_steps(row: dict[str, str]) -> None:
    """One GPU, 4 layers, 128K. Packed documents are predicted by the area that they compute."""
    step = {"gpus": "1", "pattern": "toeplitz_random", "recompute": "keep_attention"} | row
    predicted = step_row(step | {"density": row["area"]})
    assert predicted == pytest.approx(float(row["step_seconds"]), rel=WITHIN)


def test_measured_step_without_telemetry() -> None:
    """Two GPUs, 36 layers, 64K: the step beside which the costs of telemetry were timed."""
    (row,) = (row for row in rows(TELEMETRY) if row["item"] == "none")
    step = {"pattern": "toeplitz_random", "recompute": "keep_attention"} | row
    assert 1000 * step_row(step) == pytest.approx(float(row["step_ms"]), rel=WITHIN)


def test_every_measurement_is_compared() -> None:
    """A new file of rings or steps on a GPU with rates must be compared, or named here with a reason."""
    compared = {RINGS, *STEPS, PROFILES, RING_PROFILE, PACKED, TELEMETRY}
    measured = {rates.gpu for rates in map(read_rates, built_in().values())}
    timed = {"step_seconds", "step_ms", "forward_ms", "component"}
    found = {
        path.name
        for path in RESULTS.glob("*.csv")
        if (lines := rows(path.name))
        and timed & set(lines[0])
        and {row.get("gpu") for row in lines} & measured
    }
    assert found == compared | LINEAR


@pytest.mark.parametrize("layout", ["striped", "zigzag", "contiguous"])
def test_work_is_the_index_s(layout: str) -> None:
    """Tiles of each rank and source are those that the ring's own accounting finds."""
    pattern = ToeplitzRandom(block_size=16, density=0.3, window=2, columns=16)
    index = Index.prescribed(pattern, 1024, 4)
    from mtraining.pattern.base import SequenceShard

    q = torch.empty(1, 1, 4, 1)
    real = pattern.estimate(q, q, SequenceShard.whole(1024), 1.0)
    dealt = build_layout(layout, 16)
    assert torch.allclose(4 * index.tiles(dealt, 4), tile_work(real, dealt, 4))
    dense = Index.all_tiles(1024, 16).tiles(dealt, 4)
    assert float(dense.sum()) == 64 * 65 / 2
    assert imbalance(dense).worker >= 1
    assert float(index.column_tiles(dealt, 4).sum()) == pytest.approx(64 * 16 / 16 / 2)


def test_recompute_and_sharding() -> None:
    """Keeping everything is fastest, full recompute slowest; on many GPUs slow links show the parameters' way."""
    rates, tokens = rates_of("h200"), 131072
    model = ModelShape.of(build_model(SHAPES["qwen2.5-3b"], tokens, 4, torch.device("meta")))
    index = Index.prescribed(ToeplitzRandom(density=0.1), tokens, 16)
    network = Network(8, rates.intra, Link.of_rate(25e9))

    def seconds(
        recompute: str, link: Network = network, policies: tuple[LayerPolicy, ...] | None = None
    ) -> float:
        setting = Setting(1, 32, 4, build_layout("striped", 128), recompute, policies=policies)
        return step_time(model, index, setting, rates, link).seconds

    assert seconds("none") < seconds("keep_attention") < seconds("full")
    mixed = {
        name: seconds("auto", policies=tuple(layer_policies(name, False, 4))) for name in ("none", "full")
    }
    assert mixed == {name: seconds(name) for name in mixed}
    parts = [frozenset[str](), *(frozenset(PARTS[:n]) for n in (1, 2, 3))]
    kept = [seconds("auto", policies=(LayerPolicy(part),) * 4) for part in parts]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert kept[0] == seconds("full") and kept[1] == seconds("keep_attention") and kept[3] > seconds("none")
    half = (LayerPolicy(), LayerPolicy(), LayerPolicy(everything=True), LayerPolicy(everything=True))
    assert seconds("auto", policies=half) == pytest.approx((seconds("full") + seconds("none")) / 2)
    slow = Network(8, rates.intra, Link.of_rate(1e9))
    assert seconds("full", slow) > seconds("full")
    # 31/32 of a gigabyte over eight links of 25 GB/s to the next node.
    assert shard_seconds(1e9, 32, Network(8, Link.of_rate(300e9), Link.of_rate(25e9))) == pytest.approx(
        31 / 32 / 200
    )


def test_links() -> None:
    measured = rates_of("h200").intra
    assert measured is not None
    assert measured.seconds(64 * 2**20) == pytest.approx(2**26 / 155e9, rel=0.01)
    assert measured.seconds(1) == measured.seconds(2**20)
    assert measured.seconds(2**30) == pytest.approx(1.521e-3 + 2**29 / measured.bytes_per_second)
    assert Link.parse("25GB/s", "--inter").seconds(25e9) == pytest.approx(1)
    assert Link.parse("25 GB/s,20us", "--inter").seconds(0) == pytest.approx(20e-6)
    with pytest.raises(UserError, match="--inter"):
        Link.parse("25Gb", "--inter")


def test_gpus_without_rates(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bench rates"):
        rates_of("a100")
    assert rates_of_device("NVIDIA A100") is None
    assert rates_of_device("NVIDIA H200") == rates_of("h200")
    assert rates_of_device("NVIDIA H100 80GB HBM3") == rates_of("h100") != rates_of("h200")
    with pytest.raises(UserError, match="head_dim 64"):
        rates_of("h200").attention_at(64)
    with pytest.raises(UserError, match="fused=eager"):
        rates_of("h200").around("eager")
    wrong = tmp_path / "rates.json"
    wrong.write_text('{"gpu": "x"}')
    with pytest.raises(UserError, match="is no rates file"):
        read_rates(wrong)
    given = json.loads(built_in()["h200"].read_text())
    wrong.write_text(json.dumps(given | {"intra": [[1, 2e-5], [2, 1e-5]]}))
    with pytest.raises(UserError, match="its longest message takes no longer"):
        read_rates(wrong)
    with pytest.raises(UserError, match="cannot be read"):
        read_rates(tmp_path / "none.json")
