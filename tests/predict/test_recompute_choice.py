"""`train.recompute: auto`: what each layer keeps fits the memory, costs least time, and is what the step then takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import MemoryCase, measured
from typer.testing import CliRunner

from distributed import ProcessPool
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.model.recompute import PARTS, LayerPolicy
from mtraining.pattern import build_pattern
from mtraining.predict.measured import rates_of
from mtraining.predict.memory import GIB, OUTSIDE, Traces, Unpredictable, Workload, predict
from mtraining.predict.recompute import Choice, Room, choose_policies, policies_text
from mtraining.train import recompute as in_training
from mtraining.train.recompute import ON_CPU, choose_together, gpu_memory

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen2.5-3b-512k.yaml"
CASE = MemoryCase(layers=8)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def work() -> Workload:
    return CASE.work()


@pytest.fixture(scope="module")
def traces(work: Workload) -> Traces:
    return Traces(work)


def peak(work: Workload, traces: Traces, recompute: str | Sequence[LayerPolicy]) -> float:
    return predict(replace(work, recompute=recompute), traces).peak


def room_of(size: float) -> Room:
    return Room(size, size, size)


def between(work: Workload, traces: Traces, share: float) -> Room:
    """From what full recompute needs (0) to what keeping everything needs (1)."""
    least, most = peak(work, traces, "full"), peak(work, traces, "none")
    return room_of(least + share * (most - least))


def test_more_memory_keeps_more_and_the_last_layers_keep_most(work: Workload, traces: Traces) -> None:
    def rank(policy: LayerPolicy) -> tuple[bool, int]:
        return policy.everything, len(policy.parts)

    found = [choose_policies(work, between(work, traces, share / 8), None, traces) for share in range(9)]
    for share, choice in enumerate(found):
        assert choice.prediction.peak <= between(work, traces, share / 8).peak
        assert choice.prediction.peak == peak(work, traces, choice.policies)
        assert list(choice.policies) == sorted(choice.policies, key=rank)
    again = [choice.again for choice in found]
    assert again == sorted(again, reverse=True) and len(set(again)) > 4
    assert all(policy.everything for policy in found[-1].policies) and again[-1] == 0


def test_no_layer_could_keep_a_part_more(work: Workload, traces: Traces) -> None:
    room = between(work, traces, 0.5)
    policies = list(choose_policies(work, room, None, traces).policies)
    for part in PARTS:
        lacking = [
            n for n, policy in enumerate(policies) if not policy.everything and part not in policy.parts
        ]
        if lacking:
            kept = LayerPolicy(policies[lacking[-1]].parts | {part})
            more = [*policies[: lacking[-1]], kept, *policies[lacking[-1] + 1 :]]
            assert peak(work, traces, more) > room.peak, part


def test_what_saves_most_time_per_byte_is_kept_first(work: Workload, traces: Traces) -> None:
    """A query reads 870 keys here, and a product costs 128 operations a byte; of the other pattern it reads 2."""
    projections = [LayerPolicy(frozenset({"projections"}))] * CASE.layers
    room = room_of(peak(work, traces, projections))
    assert all("attention" in policy.parts for policy in choose_policies(work, room, None, traces).policies)
    pattern = build_pattern("toeplitz_random", block_size=16, density=1e-3, columns=0, window=1)
    thin = replace(work, patterns=[pattern])
    policies = choose_policies(thin, room_of(peak(thin, Traces(thin), projections))).policies
    assert all("projections" in policy.parts for policy in policies)
    assert "attention" not in policies[0].parts


def test_measured_rates_are_named() -> None:
    case = MemoryCase(layers=2, hidden=512)  # heads of 128, which were measured
    work = replace(case.work(), fused="liger")
    room = between(work, Traces(work), 0.3)
    known, unknown = choose_policies(work, room, rates_of("h200")), choose_policies(work, room)
    assert known.basis == "measured rates of NVIDIA H200" and 0 < known.again < 1
    assert unknown.basis == "floating-point operations" and unknown.again > 1e6


def test_compiled_layers_keep_attention_or_everything(work: Workload) -> None:
    work = replace(work, fused="compile")
    traces = Traces(work)
    for share in (0.2, 0.6):
        policies = choose_policies(work, between(work, traces, share), None, traces).policies
        assert {policy.parts for policy in policies} <= {frozenset(), frozenset({"attention"})}


def test_layers_in_float8_keep_no_single_products(work: Workload, traces: Traces) -> None:
    small = replace(work, float8="rowwise")
    own = Traces(small)
    chosen = [choose_policies(small, between(small, own, share / 4), None, own) for share in range(5)]
    for choice in chosen:
        assert all(policy.everything or not policy.parts - {"attention"} for policy in choice.policies)
    # What is computed again is counted as it is without float8.
    least = choose_policies(work, between(work, traces, 0), None, traces)
    assert chosen[0].again == pytest.approx(least.again)


def test_host_memory_makes_room_where_it_may_be_used(work: Workload, traces: Traces) -> None:
    room = room_of(peak(work, traces, "keep_attention"))
    here = choose_policies(work, room, None, traces)
    away = choose_policies(replace(work, offload=True), room, None, traces)
    assert not any(policy.offload for policy in here.policies)
    assert away.policies[0].offload and not away.policies[-1].offload
    assert away.again < here.again and away.prediction.peak <= room.peak
    assert "taken to be hidden" in away.basis
    # As little as serves: nothing leaves where all fits.
    whole = choose_policies(replace(work, offload=True), between(work, traces, 1), None, traces)
    assert not any(policy.offload for policy in whole.policies)


def test_copies_that_nothing_hides_are_not_made() -> None:
    case = MemoryCase(layers=4, hidden=512)
    work = replace(case.work(), fused="liger", offload=True)
    room = room_of(peak(work, Traces(work), "keep_attention"))
    for rate, leaves in ((1e-3, False), (1e6, True)):
        rates = replace(rates_of("h200"), host_gb_per_s=rate)
        choice = choose_policies(work, room, rates)
        assert any(policy.offload for policy in choice.policies) == leaves
        assert choice.basis == "measured rates of NVIDIA H200"


def test_what_cannot_fit_is_told_with_the_least(work: Workload, traces: Traces) -> None:
    least = predict(replace(work, recompute="full"), traces)
    with pytest.raises(UserError) as refusal:
        choose_policies(work, Room.of(0.9 * least.needed), None, traces)
    sentence = str(refusal.value)
    for part in (
        "train.recompute=auto",
        "at least 2.5",
        "train.offload=true",
        "parallel.cp",
        "train.seq_len",
    ):
        assert part in sentence, sentence
    with pytest.raises(UserError) as refusal:
        choose_policies(replace(work, offload=True), room_of(1.0), None, traces)
    assert "train.offload=true" not in str(refusal.value)


def test_room_leaves_what_a_prediction_leaves(work: Workload, traces: Traces) -> None:
    for memory in (3 * GIB, 79.1 * GIB):
        room = Room.of(memory)
        found = replace(predict(work, traces), components={"all": room.most})
        assert found.needed == pytest.approx(memory)
        found = replace(found, components={"all": room.peak})
        assert found.wanted == pytest.approx(memory)
    # Measured: beside 68.5 GiB of tensors 6.2 GiB were taken, and no step ran short of 79.2 GiB; beside 71.9 each did.
    assert Room.of(79.2 * GIB).peak < (79.2 * GIB - OUTSIDE) / (1 + 6.2 / 68.5)


def test_what_fits_with_little_left_is_taken_and_told(work: Workload, traces: Traces) -> None:
    least = predict(replace(work, recompute="full"), traces)
    small = Room.of(0.5 * (least.needed + least.wanted))
    choice = choose_policies(work, small, None, traces)
    assert set(choice.policies) == {LayerPolicy()}
    assert "which is little: PyTorch may give memory back" in choice.render(small)
    large = Room.of(least.wanted + 1)
    assert "which is little" not in choose_policies(work, large, None, traces).render(large)


@pytest.mark.parametrize("share", [0.3, pytest.param(0.7, marks=pytest.mark.slow)])
def test_a_step_takes_what_was_chosen(
    pool: ProcessPool, work: Workload, traces: Traces, share: float
) -> None:
    choice = choose_policies(work, between(work, traces, share), None, traces)
    assert len(set(choice.policies)) > 1
    found = min(pool.run(measured, CASE.world, case=replace(CASE, recompute=choice.policies)))
    assert choice.prediction.peak == pytest.approx(found, rel=0.10)


def test_the_line_of_a_log(work: Workload, traces: Traces) -> None:
    inner = LayerPolicy(frozenset({"attention", "mlp"}))
    away = LayerPolicy(frozenset({"attention"}), offload=True)
    policies = (
        away,
        away,
        LayerPolicy(),
        inner,
        *(2 * [LayerPolicy(frozenset(PARTS))]),
        LayerPolicy(everything=True),
    )
    assert policies_text(policies) == (
        "layers 0-1 keep attention (offloaded), 2 keeps nothing but the input, 3 keeps attention and MLP inner, 4-5 "
        "keep attention, its products and MLP inner, 6 keeps everything"
    )
    choice = Choice((LayerPolicy(everything=True),), predict(work, traces), 0.0, "nothing")
    line = choice.render(Room.of(79.1 * GIB))
    assert line.startswith("train.recompute=auto: layer 0 keeps everything; predicted 2.5")
    assert "of 79.1 GiB, 76.6 GiB stay free; order by nothing" in line and "\n" not in line


def smallest(work: Workload, memory: Sequence[float | None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank of such GPUs chooses; None is a rank on a CPU."""
    monkeypatch.setattr(in_training, "gpu_memory", lambda device: 1.0 * memory[0])  # type: ignore[operator]
    monkeypatch.setattr(in_training, "known_rates", lambda device: None)
    everywhere = [(None if size is None else Room.of(size), None) for size in memory]
    device = CPU if memory[0] is None else GPU
    return [choose_together(work, device, lambda mine: everywhere) for _ in memory]


def test_all_ranks_choose_for_the_smallest_gpu(
    work: Workload, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = 0.5 * predict(replace(work, recompute="full"), traces).needed
    small += 0.5 * predict(replace(work, recompute="none"), traces).needed
    for memory in ([small, 80.0 * GIB], [80.0 * GIB, small]):
        for choice, line in smallest(work, memory, monkeypatch):
            assert choice.policies == choose_policies(work, Room.of(small), None, traces).policies
            assert not choice.policies[0].everything and "of 2.5" in line


@pytest.mark.parametrize(
    "free, reserved, limit, expected",
    [
        (79.0, 0.0, 1.0, 80),
        (70.0, 9.0, 1.0, 80),
        (60.0, 5.0, 1.0, 65 + OUTSIDE / GIB),
        (79.0, 0.0, 0.5, 40),
        (60.0, 5.0, 0.9, 65 + OUTSIDE / GIB),
    ],
    ids=["own context", "own tensors", "another program", "limit", "another program and a limit"],
)
def test_memory_that_a_process_may_take(
    monkeypatch: pytest.MonkeyPatch, free: float, reserved: float, limit: float, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: limit, raising=False)
    assert gpu_memory(GPU) == expected * GIB


def test_on_cpus_all_is_kept_and_told(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smallest(work, [None, None], monkeypatch) == [(None, ON_CPU)] * 2


def test_a_model_that_cannot_be_predicted_is_refused(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Choice:
        raise Unpredictable("memory cannot be predicted for jetmoe.")

    monkeypatch.setattr(in_training, "choose_policies", unknown)
    with pytest.raises(UserError, match="auto: memory cannot be predicted .*set train.recompute to full"):
        in_training.choose(work, Room.of(GIB), None)


def dry_run(*options: str) -> Any:
    sets = ["parallel.cp=4", "parallel.cp_outer=1", "train.recompute=auto"]
    return CliRunner().invoke(
        app, ["train", str(RECIPE), "--dry-run", *(part for one in sets for part in ("--set", one)), *options]
    )


def test_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told = dry_run("--memory-gib", "79.1")
    assert told.exit_code == 0, told.output
    assert "train.recompute=auto: layers 0-" in told.output and "kept: products of matrices" in told.output
    assert "fits into 79.1 GiB" in told.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = str(dry_run().exception)
    assert "--memory-gib" in refused and "train.recompute=auto" in refused and refused.count(". ") == 0
    least = dry_run("--memory-gib", "20").exception
    assert isinstance(least, UserError) and "at least" in str(least) and "20.0 GiB" in str(least)
