"""ContextParallelTrainer on packed documents and sliding windows: what plain Trainer computes on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from trainer_cases import DENSE, WINDOW, arguments, collate, curves, examples, launched, model
from transformers import DataCollatorWithFlattening, Trainer

from distributed import ProcessPool, Worker
from mtraining.errors import UserError

pytest.importorskip("accelerate")
if Version(transformers.__version__) < Version("5.24"):
    pytest.skip("Trainer's methods had other names", allow_module_level=True)

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "packed": (True, {}),
    "window": (False, WINDOW),
    "packed, window": (True, WINDOW),
}


def trained(kind: type[Trainer], output: Path, case: str, **options: Any) -> dict[str, list[float]]:
    """What is logged. Packed: each batch is one sequence of two documents."""
    packed, settings = CASES[case]
    data = examples()
    trainer = kind(
        model(**settings),
        arguments(output, 2),
        DataCollatorWithFlattening() if packed else collate,
        train_dataset=data,
        eval_dataset=data[:6],
        **options,
    )
    trainer.train()
    return curves(trainer)


def ours(output: Path, case: str) -> dict[str, list[float]]:
    from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer

    spread = ContextParallelConfig(loss_chunk=40, **DENSE)  # type: ignore[arg-type]
    return trained(ContextParallelTrainer, output, case, context_parallel=spread)


def job(worker: Worker, output: Path, case: str) -> dict[str, list[float]]:
    with launched(worker.rank, worker.world):
        return ours(output, case)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_plain_trainer(case: str, pool: ProcessPool, tmp_path: Path) -> None:
    expected = trained(Trainer, tmp_path / "plain", case)
    assert len(expected["loss"]) == 4 and len(expected["eval_loss"]) == 2
    for found in pool.run(job, world=2, output=tmp_path / "two", case=case):
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, rel=1e-5), key


def test_the_reference_keeps_documents_and_windows_apart(tmp_path: Path) -> None:
    """Else the comparison above would be of nothing. Documents of a packed batch are the rows of a padded one."""
    packed, window, both = (trained(Trainer, tmp_path / case, case)["loss"] for case in CASES)
    assert both == pytest.approx(window, rel=1e-5)
    assert packed != pytest.approx(both, rel=1e-4)


def test_position_ids_tell_where_documents_begin() -> None:
    from mtraining.integrations.batches import Dealer
    from mtraining.layout import build_layout

    ids = torch.arange(6)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])}
    dealer = Dealer(build_layout("contiguous"), {4}, 1, 2)
    dealt = dealer.deal(batch)
    assert dealt.starts is not None and dealt.starts.dtype == torch.int32
    assert dealt.starts.tolist() == [[0, 0, 0, 3, 4, 4, 6, 6]]
    assert dealt.position_ids.tolist() == [[0, 1, 0, 1]] and dealt.input_ids.tolist() == [[4, 5, 0, 0]]
    for wrong in ([[0, 1, 2, 5, 6, 7]], [[1, 2, 3, 4, 5, 6]], [[0, 1, 2, 0, 1]]):
        with pytest.raises(UserError, match="position_ids: "):
            dealer.deal({**batch, "position_ids": torch.tensor(wrong)})


def packed_by_trl(output: Path, ours: bool) -> list[float]:
    """Losses of SFTTrainer on sequences that it packs."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer

    words = Tokenizer(models.WordLevel({"<eos>": 0, **{str(n): n for n in range(1, 97)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    rows = [{"text": " ".join(str(i * n % 97) for i in range(5 + 3 * n))} for n in range(1, 17)]
    kind: type[Trainer] = SFTTrainer
    options: dict[str, Any] = {}
    if ours:
        kind = type("Mine", (ContextParallelTrainer, SFTTrainer), {})
        options = {"context_parallel": ContextParallelConfig(loss_chunk=40, **DENSE)}  # type: ignore[arg-type]
    trainer = kind(
        model(),
        SFTConfig(
            str(output), max_steps=3, max_length=64, packing=True, per_device_train_batch_size=1,
            learning_rate=1e-2, use_cpu=True, bf16=False, logging_steps=1, report_to="none",
            gradient_checkpointing=None, activation_checkpointing=False,
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=11,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )  # fmt: skip
    trainer.train()
    return curves(trainer)["loss"]


def packed_by_trl_job(worker: Worker, output: Path) -> list[float]:
    with launched(worker.rank, worker.world):
        return packed_by_trl(output, True)


@pytest.mark.slow
def test_documents_that_trl_packs_are_apart(pool: ProcessPool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    expected = packed_by_trl(tmp_path / "plain", False)
    assert len(expected) == 3
    for losses in pool.run(packed_by_trl_job, world=2, output=tmp_path / "two"):
        assert losses == pytest.approx(expected, rel=1e-5)
