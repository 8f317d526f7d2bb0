"""ContextParallelTrainer: losses, norms, evaluation, files and resume are those of plain Trainer on one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from trainer_cases import DENSE, arguments, collate, curves, examples, launched, model
from transformers import AutoModelForCausalLM, Trainer

from distributed import ProcessPool, Worker
from memory_limits import limited
from mtraining.errors import UserError

pytest.importorskip("accelerate")
if Version(transformers.__version__) < Version("5.24"):
    pytest.skip("Trainer's methods had other names", allow_module_level=True)

# By grid: processes, cp, sequences that a data-parallel group reads at once; always two a micro-batch in all.
GRIDS = {"alone": (1, 1, 2), "cp2": (2, 2, 2), "dp2": (2, 1, 1), "dp2xcp2": (4, 2, 1)}


def plain(output: Path, **options: Any) -> Trainer:
    data = examples()
    trainer = Trainer(
        model(), arguments(output, 2, **options), collate, train_dataset=data, eval_dataset=data[:6]
    )
    trainer.train()
    return trainer


def ours(
    output: Path, grid: str, resume: bool = False, peft: bool = False, tied: bool = False, **options: Any
) -> Any:
    from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer

    _, cp, batch = GRIDS[grid]
    data = examples()
    trainer = ContextParallelTrainer(
        adapted() if peft else model(tied),
        arguments(output, batch, **options),
        collate,
        train_dataset=data,
        eval_dataset=data[:6],
        context_parallel=ContextParallelConfig(cp=cp, loss_chunk=40, **DENSE),  # type: ignore[arg-type]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def job(worker: Worker, **given: Any) -> dict[str, list[float]]:
    """Job: a run on this grid; what was logged."""
    with launched(worker.rank, worker.world):
        trainer = ours(**given)
        trainer.save_model(str(given["output"] / "model"))
        return curves(trainer)


def waits_of_groups(worker: Worker, output: Path) -> set[timedelta]:
    """Job: how long collectives may wait in each group that a trainer makes."""
    from mtraining.train.mesh import process_groups

    before = process_groups()
    with launched(worker.rank, worker.world):
        ours(output, "cp2", max_steps=1, eval_strategy="no", ddp_timeout=234)
        made = process_groups() - before
        return {group._get_backend(torch.device("cpu")).options._timeout for group in made}


def test_groups_wait_as_long_as_the_arguments_say(pool: ProcessPool, tmp_path: Path) -> None:
    assert pool.run(waits_of_groups, world=2, output=tmp_path) == [{timedelta(seconds=234)}] * 2


def adapted() -> Any:
    from mtraining.model import LoraOptions
    from mtraining.model.lora import add_lora

    return add_lora(model(), LoraOptions(r=4, also_train=("embed_tokens",)), seed=0)


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    trainer = plain(tmp_path_factory.mktemp("plain"))
    return curves(trainer), trainer.model.state_dict()


@pytest.mark.parametrize(
    "grid", [pytest.param(name, marks=pytest.mark.slow) if name == "dp2xcp2" else name for name in GRIDS]
)
def test_a_run_is_that_of_plain_trainer(grid: str, pool: ProcessPool, expected: Any, tmp_path: Path) -> None:
    logged, weights = expected
    if grid == "alone":  # without a launcher, as a script is tried out
        trainer = ours(tmp_path, grid)
        trainer.save_model(str(tmp_path / "model"))
        found = [curves(trainer)]
    else:
        found = pool.run(job, world=GRIDS[grid][0], output=tmp_path, grid=grid)
    assert len(logged["loss"]) == 4 and len(logged["eval_loss"]) == 2
    for one in found:
        for key, values in logged.items():
            assert one[key] == pytest.approx(values, rel=1e-5), key
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


def interrupted_job(
    worker: Worker, output: Path, grid: str, then: str, **kind: bool
) -> dict[str, list[float]]:
    """Job: two steps on one grid, saved; then four on another, from there."""
    with launched(worker.rank, worker.world):
        saving = {"save_strategy": "steps", "save_steps": 2, **kind}
        ours(output, grid, max_steps=2, lr_scheduler_type="constant", **saving)
    with launched(worker.rank, worker.world):
        return curves(ours(output, then, resume=True, lr_scheduler_type="constant", **saving))


@pytest.mark.parametrize(
    ("grid", "then", "peft", "tied"),
    [
        ("cp2", "dp2", False, True),
        pytest.param("dp2", "cp2", False, False, marks=pytest.mark.slow),
        pytest.param("cp2", "cp2", True, False, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_goes_on(
    grid: str, then: str, peft: bool, tied: bool, pool: ProcessPool, tmp_path: Path
) -> None:
    """Also on another grid, with a tied head, and with an adapter."""
    kind = {"peft": peft, "tied": tied}
    whole = ours(tmp_path / "whole", "alone", lr_scheduler_type="constant", **kind)
    found = pool.run(interrupted_job, world=2, output=tmp_path / "cut", grid=grid, then=then, **kind)
    for key, values in curves(whole).items():
        assert found[0][key] == pytest.approx(values, rel=1e-5), key
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"mtraining", "scheduler.pt", "trainer_state.json"} <= names
    assert ("adapter_model.safetensors" if peft else "model.safetensors") in names
    kinds = {
        name.split(".")[0]
        for name in FileSystemReader(checkpoint / "mtraining").read_metadata().state_dict_metadata
    }
    assert kinds == ({"model", "optimizer"} if peft else {"optimizer"}), "weights are written once"
    if peft:
        from peft import PeftModel

        from mtraining.model.adapters import transformers_names_allowed

        with transformers_names_allowed():
            loaded = PeftModel.from_pretrained(model(), checkpoint)
        tokens = torch.tensor([examples()[0]["input_ids"]])
        mine = whole.model.base_model.model
        mine.set_attn_implementation("eager")
        torch.testing.assert_close(loaded(tokens).logits, mine(tokens).logits, rtol=1e-4, atol=1e-4)


def damaged_job(worker: Worker, output: Path) -> list[str]:
    """Job: what a resume says of a checkpoint whose weights are of another model, damaged, or absent."""
    said = []
    with launched(worker.rank, worker.world):
        ours(output, "cp2", max_steps=1, eval_strategy="no", save_strategy="steps", save_steps=1)
        weights = output / "checkpoint-1" / "model.safetensors"
        whole = load_file(weights)
        for change in ("fewer", "damaged", "absent"):
            torch.distributed.barrier()
            if worker.rank == 0:
                if change == "fewer":
                    save_file(dict(list(whole.items())[1:]), weights, metadata={"format": "pt"})
                elif change == "damaged":
                    weights.write_bytes(weights.read_bytes()[:100])
                else:
                    weights.unlink()
            torch.distributed.barrier()
            try:
                ours(output, "cp2", resume=True, max_steps=2, eval_strategy="no")
            except UserError as error:
                said.append(str(error))
    return said


def test_weights_that_cannot_be_resumed_from_are_refused_on_every_rank(
    pool: ProcessPool, tmp_path: Path
) -> None:
    for said in pool.run(damaged_job, world=2, output=tmp_path):
        assert len(said) == 3
        assert all(one.startswith("resume_from_checkpoint=") for one in said), said
        assert "lacks" in said[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not go with context parallelism"),
        ({"torch_compile": True}, "use ContextParallelConfig.fused='compile'"),
        ({"use_liger_kernel": True}, "use ContextParallelConfig.fused='liger'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "deals sequences by rank"),
        ({"bf16": True}, "bf16=True needs FSDP; start the script by torchrun"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        ours(tmp_path, "alone", **options)


def with_recompute(output: Path, recompute: str, **options: Any) -> dict[str, list[float]]:
    """What a run alone logged."""
    from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer

    given = ContextParallelConfig(recompute=recompute, **options, **DENSE)  # type: ignore[arg-type]
    settings = arguments(output, 2, max_steps=2, gradient_accumulation_steps=1, eval_strategy="no")
    trainer = ContextParallelTrainer(
        model(), settings, collate, train_dataset=examples(), context_parallel=given
    )
    trainer.train()
    return curves(trainer)


def test_layers_keep_what_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtraining.integrations import trainer

    expected = with_recompute(tmp_path / "none", "none")
    assert with_recompute(tmp_path / "cpu", "auto", seq_len=64) == expected
    chosen = limited(monkeypatch, trainer, 0.5)
    assert with_recompute(tmp_path / "auto", "auto", seq_len=64) == expected
    assert len(chosen) == 1 and not all(policy.everything for policy in chosen[0])
    with pytest.raises(UserError, match="seq_len=48: a batch has sequences of 6. tokens"):
        with_recompute(tmp_path / "longer", "auto", seq_len=48)
    with pytest.raises(
        UserError, match=r"recompute='auto' must know the longest sequence; use .*\(seq_len=...\)"
    ):
        with_recompute(tmp_path / "unknown", "auto")


def test_trainers_with_a_loss_of_their_own_are_refused_as_they_are_defined() -> None:
    from transformers import Seq2SeqTrainer

    from mtraining.integrations import ContextParallelTrainer

    class Preferences(Trainer):
        def compute_loss(self, *_: Any, **__: Any) -> Any: ...

    class Rounds(Trainer):
        def train(self, *_: Any, **__: Any) -> Any: ...

    class SFTTrainer(Preferences):  # another's, though of this name
        def compute_loss(self, *_: Any, **__: Any) -> Any: ...

    for base, method in (
        (Preferences, "compute_loss"),
        (Rounds, "train"),
        (SFTTrainer, "compute_loss"),
        (Seq2SeqTrainer, "prediction_step"),
    ):
        with pytest.raises(UserError, match=f"{base.__name__}: its {method} is its own, .* use one of these"):
            type("Mine", (ContextParallelTrainer, base), {})
    with pytest.raises(
        UserError, match="Mine: Preferences stands before .* put ContextParallelTrainer first"
    ):
        type("Mine", (Preferences, ContextParallelTrainer), {})
    with pytest.raises(UserError, match=r"Mine.compute_loss: no process has the whole sequence"):
        type("Mine", (ContextParallelTrainer,), {"compute_loss": lambda *_: None})
    type("Mine", (ContextParallelTrainer,), {"log": lambda *_: None})


@pytest.mark.slow
def test_of_trl_only_supervised_fine_tuning_is_taken() -> None:
    trl = pytest.importorskip("trl")
    from mtraining.integrations import ContextParallelTrainer

    type("Mine", (ContextParallelTrainer, trl.SFTTrainer), {})
    for name in ("DPOTrainer", "GRPOTrainer", "KTOTrainer", "RewardTrainer", "RLOOTrainer"):
        with pytest.raises(UserError, match=f"{name}: its "):
            type("Mine", (ContextParallelTrainer, getattr(trl, name)), {})


def test_metrics_of_logits_are_refused(tmp_path: Path) -> None:
    from mtraining.integrations import ContextParallelTrainer

    with pytest.raises(UserError, match="compute_metrics: logits are never whole"):
        ContextParallelTrainer(model(), arguments(tmp_path, 2), compute_metrics=lambda _: {})


def test_float8_is_the_option_of_parallelize(tmp_path: Path) -> None:
    from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer

    def made(how: Any) -> Any:
        options = ContextParallelConfig(float8=how)
        given = arguments(tmp_path, 2, eval_strategy="no")
        return ContextParallelTrainer(model(), given, context_parallel=options)

    with pytest.raises(UserError, match="train.float8=rowwise needs an NVIDIA GPU, not cpu"):
        made("rowwise")
    assert made("emulated").parallel_model.float8.startswith("float8, emulated: 14 linear layers")


def test_grids_that_do_not_divide_the_processes_are_refused() -> None:
    from mtraining.integrations import ContextParallelConfig

    assert ContextParallelConfig().grid(4) == (1, 4) and ContextParallelConfig(cp=2).grid(4) == (2, 2)
    with pytest.raises(UserError, match="cp=3 does not divide the 4 processes"):
        ContextParallelConfig(cp=3).grid(4)
    with pytest.raises(UserError, match="cp_outer=3 must divide cp=4"):
        ContextParallelConfig(cp_outer=3).grid(4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "padded on the left"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "no mask of padding"),
        ({"labels": None}, "labels: the batch has none"),
    ],
)
def test_batches_that_would_be_computed_wrongly_are_refused(change: dict[str, Any], sentence: str) -> None:
    from mtraining.integrations.batches import Dealer
    from mtraining.layout import build_layout

    ids = torch.arange(4)[None]
    dealer = Dealer(build_layout("striped", 8), {8}, 0, 2)
    dealt = dealer.deal({"input_ids": ids, "labels": ids, "position_ids": ids})
    assert dealt.labels.tolist() == [[1, 2, 3, -100, *4 * [-100]]] and dealt.input_ids.shape == (1, 8)
    with pytest.raises(UserError, match=sentence):
        dealer.deal({"input_ids": ids, "labels": ids, **change})
