"""AdamW's moments in 8 bits and in host memory: the same updates, other homes, and checkpoints that fit any grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_run import differing, raw_config, run_job, tensors
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from distributed import ProcessPool, Worker
from library_warnings import COMPILE
from mtraining.errors import UserError
from mtraining.model import build_model
from mtraining.model.load import ModelOptions
from mtraining.predict.moments import CHUNK, block_of, moment_bytes, rows_at_once, update_bytes
from mtraining.predict.trace import LiveBytes
from mtraining.train import loop, moments
from mtraining.train.config import parse_config
from mtraining.train.loop import train
from mtraining.train.metrics import read_metrics
from mtraining.train.moments import AdamW8bit, OffloadedAdamW, code_values, decoded, encoded
from mtraining.train.optim import step_where_finite
from mtraining.train.store import CheckpointStore

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def eight_bits(parameters: list[nn.Parameter]) -> AdamW8bit:
    return AdamW8bit(parameters, compiled=False, **OPTIONS)


def offloaded(parameters: list[nn.Parameter]) -> OffloadedAdamW:
    return OffloadedAdamW(parameters, **OPTIONS)


def full(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **OPTIONS)


def updated(make: Make, steps: int = 5, held: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Parameters after some steps, and the optimizer. Of step ``held`` gradients are not finite."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 256), (256,), (40, 512), (30, 90), ()]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make(parameters)
    for step in range(steps):
        for parameter in parameters:
            # Far from 0, where torchao has a code that we avoid.
            parameter.grad = (0.1 + torch.rand(parameter.shape, generator=generator)).to(dtype)
            if step == held:
                parameter.grad *= float("nan")
        if held is not None:
            step_where_finite(optimizer, torch.tensor(step != held))
        else:
            optimizer.step()
    return parameters, optimizer


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- the update --------------------------------------------------------------------------------------------------------


def test_eight_bits_update_as_those_of_torchao() -> None:
    from torchao.optim import AdamW8bit as Theirs

    options = {name: value for name, value in OPTIONS.items() if name != "fused"}
    with mock.patch("torch.compile", lambda function, **_: function):
        theirs, other = updated(lambda parameters: Theirs(parameters, **options))
    mine, optimizer = updated(eight_bits)
    assert same(mine, theirs)
    assert torch.equal(optimizer.state[mine[0]]["exp_avg"], other.state[theirs[0]]["exp_avg"].codes)
    assert optimizer.state[mine[3]]["exp_avg"].dtype == torch.float32  # 90 is no multiple of 64
    assert not same(mine, updated(full)[0])


def test_moments_in_host_memory_update_as_those_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtraining.predict.moments.CHUNK", 16 * 256)
    assert rows_at_once(torch.Size((96, 256))) == 16
    assert same(updated(offloaded)[0], updated(full)[0])
    half = torch.bfloat16
    assert same(updated(offloaded, dtype=half)[0], updated(full, dtype=half)[0])


@pytest.mark.parametrize("make", [eight_bits, offloaded, full])
def test_a_step_that_is_not_finite_changes_nothing(make: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    before, optimizer = updated(make, steps=2)
    kept = [parameter.detach().clone() for parameter in before]
    states = [
        {name: value.clone() for name, value in optimizer.state[parameter].items()} for parameter in before
    ]
    for parameter in before:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * float("inf")
    step_where_finite(optimizer, torch.tensor(False))
    assert same(before, kept)
    for parameter, state in zip(before, states, strict=True):
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())
    assert same(updated(make, steps=3, held=1)[0][:1], updated(make, steps=3, held=1)[0][:1])


def test_a_second_moment_above_zero_is_never_stored_as_zero() -> None:
    """A number of an embedding's row without gradient now: torchao's code would leave eps alone to divide by."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = eight_bits([parameter])
    gradient = torch.full((64, 64), 1.0)
    gradient[:, 0] = 1e-5
    for step in range(2):
        parameter.grad = gradient if step == 0 else torch.zeros_like(gradient)
        optimizer.step()
    assert parameter.abs().max() < 3 * OPTIONS["lr"]
    signed, unsigned = code_values(CPU)
    values = torch.tensor([[1.0] * 63 + [1e-12]])
    assert encoded(values, 64, unsigned)[0][0, -1] == 1
    assert encoded(values, 64, signed)[0][0, -1] == int((signed == 0).nonzero())


def test_codes_are_near_what_they_stand_for() -> None:
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    for map_, true in zip(code_values(CPU), (values, values.square()), strict=True):
        found = decoded(*encoded(true, 64, map_), map_)
        assert (found - true).norm() / true.norm() < 0.02


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.filterwarnings(*COMPILE)
def test_the_compiled_update_equals_the_eager_one() -> None:
    torch._dynamo.reset()
    compiled, _ = updated(lambda parameters: AdamW8bit(parameters, compiled=True, **OPTIONS), steps=3)
    for mine, other in zip(compiled, updated(eight_bits, steps=3)[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-4)  # a code beside, now and then


@pytest.mark.filterwarnings(*COMPILE)
def test_shapes_do_not_compile_the_update_anew() -> None:
    """Once for each size of a block and once for what stays in fp32, which has sizes of its own too."""
    torch._dynamo.reset()
    compiled = CompileCounter()
    shapes = [(96, 256), (40, 512), (8192,), (512,), (3, 64, 512), (70, 192), (300, 64), ()]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = AdamW8bit(parameters, compiled=True, **OPTIONS)
    optimizer._update = torch.compile(moments.update_8bit, backend=compiled)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert compiled.frame_count == 4  # blocks of 256 and 64, fp32, and a single number


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_blocks_lie_within_rows() -> None:
    blocks = {(2048, 11008): 256, (128, 896): 128, (128, 576): 64, (64, 1000): None, (16, 128): None}
    blocks |= {(8, 64, 32): 256, (8192,): None, (): None}
    assert {shape: block_of(torch.Size(shape)) for shape in blocks} == blocks


def held_bytes(worker: Worker, form: str) -> int:
    """Job: bytes of the moments that this rank has in a run's optimizer after a step."""
    del worker
    from mtraining.train.mesh import joined_processes
    from mtraining.train.optim import build_optimizer

    raw = raw_config(Path("nowhere"), Path("nowhere"), train={"optimizer_state": form}, parallel={"dp": 2})
    config = parse_config(raw)
    with joined_processes(config) as process:
        from mtraining.train.loop import parallel_model

        model = parallel_model(config, process)
        optimizer = build_optimizer(model, config.train, process.device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = [value for one in optimizer.state.values() for name, value in one.items() if name != "step"]
        return sum(moments.local(value).nbytes for value in state)


@pytest.mark.parametrize("form", ["full", "8bit", "offload"])
def test_predicted_bytes_are_those_that_ranks_have(pool: ProcessPool, form: str) -> None:
    raw = raw_config(Path("nowhere"), Path("nowhere"))
    model, _ = build_model(ModelOptions.model_validate(raw["model"]), 256, device="meta")
    assert sum(moment_bytes(form, model.parameters())) == sum(pool.run(held_bytes, world=2, form=form))


def test_predicted_bytes_of_an_update_are_not_less_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtraining.predict.moments.CHUNK", CHUNK // 64)
    parameter = nn.Parameter(torch.randn(1024, 256))
    for make, form in ((eight_bits, "8bit"), (offloaded, "offload")):
        optimizer = make([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = [moments.local(value) for value in optimizer.state[parameter].values()]
        with LiveBytes() as live:
            live.ignore([parameter, parameter.grad, *state])
            live.begin("update")
            optimizer.step()
        predicted = update_bytes(form, [parameter], world=1)
        assert 0 < live.peaks["update"] <= predicted
        assert form == "offload" or predicted < 1.5 * live.peaks["update"]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def run(folder: Path, shards: Path, steps: int, form: str, **sections: Any) -> Any:
    """The mapping of a tiny run: wide enough for blocks."""
    raw = raw_config(folder, shards, checkpoint={"every": 0}, **sections)
    raw["model"]["config"] |= {"hidden_size": 128, "intermediate_size": 192}
    raw["train"] |= {"steps": steps, "optimizer_state": form, "schedule": "constant"}
    return raw


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder)]


@pytest.mark.parametrize("form", ["8bit", "offload"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, shards: Path, form: str) -> None:
    for folder, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            train(parse_config(run(tmp_path / folder, shards, steps, form)))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = (CheckpointStore(tmp_path / folder).path(4) for folder in ("whole", "parts"))
    (tmp_path / "scratch").mkdir()
    found = tensors(one, tmp_path / "scratch" / "one.pt")
    codes = [value for name, value in found.items() if "exp_avg" in name and value.dtype == torch.uint8]
    assert len(codes) == (0 if form == "offload" else 2 * (1 + 2 * 7))
    assert differing(one, other, tmp_path / "scratch") == []


@pytest.mark.parametrize("form", ["8bit", "offload"])
def test_another_number_of_ranks_reads_the_same_moments(
    tmp_path: Path, shards: Path, pool: ProcessPool, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Saved by two, read by one: every moment is the same, bit for bit."""
    folder = tmp_path / "run"
    pool.run(run_job, world=2, raw=run(folder, shards, 2, form, parallel={"dp": 2}))
    saved = tensors(CheckpointStore(folder).path(2), tmp_path / "saved.pt")
    kept: list[tuple[Any, Any]] = []
    build = loop.build_optimizer
    monkeypatch.setattr(
        loop, "build_optimizer", lambda model, *rest: kept.append((model, build(model, *rest))) or kept[-1][1]
    )
    train(parse_config(run(folder, shards, 2, form)))
    model, optimizer = kept[0]
    compared = 0
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            (stored,) = (
                tensor for path, tensor in saved.items() if f"'{name}'" in path and f"'{key}'" in path
            )
            assert torch.equal(moments.local(value), stored)
            compared += 1
    assert compared == (3 if form == "offload" else 5) * 15 + 3 * 11


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("8bit", "full"),
        pytest.param("full", "offload", marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param("full", "8bit", marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param("8bit", "offload", marks=[pytest.mark.slow, pytest.mark.sweep]),
    ],
)
def test_moments_are_converted_where_the_option_changes(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    for folder, forms in (("same", (old, old)), ("changed", (old, new))):
        for steps, form in zip((3, 6), forms, strict=True):
            train(parse_config(run(tmp_path / folder, shards, steps, form)))
    assert f"train.optimizer_state: {old} -> {new} from step 4 on" in capsys.readouterr().out
    same, changed = losses(tmp_path / "same"), losses(tmp_path / "changed")
    assert changed[:4] == same[:4]
    # Moments that began anew would be a step of the full learning rate in every weight.
    assert changed[4:] == pytest.approx(same[4:], rel=0.01)
    if (old, new) == ("full", "offload"):
        assert changed == same


def test_missing_torchao_is_refused_before_the_model(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        UserError, match=r"optimizer_state=8bit needs the package torchao.*optimizer_state=offload"
    ):
        train(parse_config(run(tmp_path / "run", shards, 2, "8bit")))
