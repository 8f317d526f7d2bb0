"""One optimizer step on stand-in models: what is updated, and when the host waits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import tiny_config
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import ProcessPool, Worker
from mtraining.bench.train.cases import SHAPES, TrainCase
from mtraining.bench.train.model import batches, parallel, random_sequences
from mtraining.bench.train.model import build_model as build_shape
from mtraining.bench.train.model import stepper as step_of
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import ModelOptions, build_model, parallelize
from mtraining.model import loss as loss_module
from mtraining.model import positions as positions_module
from mtraining.pattern import Dense
from mtraining.train import loop
from mtraining.train.config import Config, TrainSection
from mtraining.train.mesh import Process
from mtraining.train.optim import build_optimizer, step_where_finite
from mtraining.train.step import NonFinite, Stepper

OPTIONS = TrainSection(seq_len=8, steps=5, lr=0.1)
CPU = torch.device("cpu")


class Alone(Process):
    """One process without a group."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: float) -> list[float]:
        return [value]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


class Model(nn.Module):
    """A matrix and a vector, with the signature of `ParallelLM`; one number of the batch is the loss's factor."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))
        self.indices = SimpleNamespace(uncovered=lambda _: {})
        self.factor = 1.0

    def training_step(self, _: int) -> Any:
        return nullcontext()

    def refuse_inputs(self, position_ids: Tensor, labels: Tensor, starts: Tensor | None) -> None:
        pass

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        num_labels: Tensor,
        starts: Tensor | None,
    ) -> Tensor:
        return ((self.matrix @ input_ids.float() + self.vector) * self.factor).square().sum() / num_labels


def batch(labels: int = 8) -> dict[str, Tensor]:
    ids = torch.arange(8)
    return {"input_ids": ids, "position_ids": ids, "labels": torch.where(ids < labels, ids, -100)}


def stepper(model: Any) -> tuple[Stepper, torch.optim.AdamW]:
    optimizer = build_optimizer(model, OPTIONS, CPU)
    process = Alone(CPU, None, rank=0, world=1, dp_rank=0, cp_rank=0)  # type: ignore[arg-type]
    return Stepper(model, optimizer, OPTIONS, process, accumulation=1), optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, moments and step counts, copied."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30])
def test_nothing_changes_in_a_step_that_is_not_finite(factor: float) -> None:
    """A factor of 1e30, squared, is infinite in fp32."""
    model = Model()
    step, optimizer = stepper(model)
    step.run(iter([batch()]), 0)
    before = everything(model, optimizer)
    assert len(before) == 8
    model.factor = factor
    with pytest.raises(NonFinite) as caught:
        step.run(iter([batch()]), 1)
    assert (caught.value.what, caught.value.ranks) == ("the loss", [0])
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


def test_a_gradient_that_is_not_finite_under_a_finite_loss() -> None:
    model = Model()
    step, optimizer = stepper(model)
    step.run(iter([batch()]), 0)
    before = everything(model, optimizer)
    hook = model.vector.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFinite) as caught:
        step.run(iter([batch()]), 1)
    assert (caught.value.what, caught.value.ranks) == ("the gradient norm", [0])
    assert (
        model.matrix.grad is not None and model.matrix.grad.isfinite().all()
    )  # one can see where it went wrong
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
    hook.remove()
    optimizer.zero_grad()
    step.run(iter([batch()]), 1)
    assert not torch.equal(before[0], model.matrix)


def test_a_batch_without_labels_is_refused_and_changes_nothing() -> None:
    model = Model()
    step, optimizer = stepper(model)
    before = everything(model, optimizer)
    with pytest.raises(UserError, match="step 3: no token of the batch has a label"):
        step.run(iter([batch(labels=0)]), 2)
    assert torch.equal(before[0], model.matrix)


def tiny_lm() -> Any:
    """One layer, 16 words."""
    config = {"model_type": "qwen2", "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    hf_model, _ = build_model(ModelOptions(config=config), 32)
    return parallelize(hf_model, pattern=Dense(block_size=8), layout=build_layout("contiguous"))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            {"position_ids": torch.arange(16).repeat(2)[None]},
            r"position_ids are not .*: local token 16 has 0, not 16",
        ),
        ({"labels": torch.full((1, 32), -1)}, r"labels: 32 of them \(such as -1\) are neither -100"),
        ({"labels": torch.full((1, 32), -101)}, r"labels: 32 of them \(such as -101\) are neither -100"),
        (
            {"labels": torch.arange(32)[None]},
            r"labels: 16 of them \(such as 16\) .* the model's 16 words, 0 to 15",
        ),
    ],
)
def test_inputs_that_cannot_be_trained_on_change_nothing(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, Tensor], sentence: str
) -> None:
    """As on a GPU, where nothing looks at them before the step is done. They come after a batch that is right."""
    for module in (loss_module, positions_module):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    model = tiny_lm()
    step, optimizer = stepper(model)
    ids = torch.arange(32)[None] % 16
    right = {"input_ids": ids, "position_ids": torch.arange(32)[None], "labels": ids}
    step.run(iter([right]), 0)
    before = everything(model, optimizer)
    with pytest.raises(UserError, match=rf"^step 2, rank 0: {sentence}"):
        step.run(iter([right | fault]), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


class Reads(TorchDispatchMode):
    """Notes the optimizer's kernel, and every number that the host asks of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "_fused_adamw_", "nonzero", "equal", "is_nonzero"):
            self.log.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_reads_once_and_only_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = stepper(Model())
    reads = Reads()
    tolist = Tensor.tolist

    def noted(self: Tensor) -> Any:
        reads.log.append("tolist")
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", noted)
    with reads:
        step.run(iter([batch()]), 0)
    assert reads.log == ["_fused_adamw_"] * 2 + ["tolist"]  # matrices, vectors


def test_telemetry_is_read_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an observed step asks of the device before its update is what any step of this pattern asks on a CPU."""
    case = TrainCase(SHAPES["tiny"], 128, 0.6, "striped", "flat", "keep_attention", 2)
    process = Alone(CPU, None, 0, 1, 0, 0)  # type: ignore[arg-type]
    tolist = Tensor.tolist
    asked: list[int] = []
    for observe in (False, True):
        model = parallel(case, build_shape(case.shape, 128, 2, CPU), process)
        step, data = step_of(case, model, process), batches(case, random_sequences(256, 128), process)
        step.run(data, 0, observe=observe)
        reads = Reads()

        def noted(self: Tensor, log: list[str] = reads.log) -> Any:
            log.append("tolist")
            return tolist(self)

        monkeypatch.setattr(Tensor, "tolist", noted)
        with reads:
            result = step.run(data, 1, observe=observe, recall_rows=4)
        monkeypatch.setattr(Tensor, "tolist", tolist)
        asked.append(reads.log.index("_fused_adamw_"))
        assert len(result.attention) == 2 * observe and bool(result.telemetry) == observe
    assert asked[0] == asked[1]


def sharded_job(worker: Worker) -> list[list[Tensor]]:
    """Job: two updates of sharded parameters, a held one between; all state after each."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=worker.mesh())
    optimizer = build_optimizer(model, OPTIONS, CPU)
    seen = []
    for finite in (True, False, True):
        model(torch.ones(2, 8)).square().sum().backward()
        step_where_finite(optimizer, torch.tensor(finite))
        optimizer.zero_grad()
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        tensors = (*model.parameters(), *state)
        seen.append([x.full_tensor() if hasattr(x, "full_tensor") else x.clone() for x in tensors])
    return seen


def test_sharded_parameters_are_held_too(pool: ProcessPool) -> None:
    first, held, last = pool.run(sharded_job, world=2)[0]
    assert len(first) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, held, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_holds_for_the_run_and_no_longer(
    asked: bool, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = loop.parallel_model

    def built(config: Config, process: Process, *recompute: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return real(config, process, *recompute)

    monkeypatch.setattr(loop, "parallel_model", built)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    loop.train(
        tiny_config(tmp_path / "run", shards, train={"deterministic": asked, "steps": 1, "warmup_steps": 0})
    )
    assert seen == [asked]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_pinned(
    device: str, pinned: bool, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        loop, "build_loader", lambda dataset, **options: [asked.append(options["pin_memory"])] * 0
    )
    process = Process(torch.device(device), None, rank=0, world=1, dp_rank=0, cp_rank=0)  # type: ignore[arg-type]
    loop._batches(tiny_config(tmp_path, shards), process, None, 0)  # type: ignore[arg-type]
    assert asked == [pinned]
