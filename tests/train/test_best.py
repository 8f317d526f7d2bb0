"""The checkpoint of the lowest held-out loss: saved, kept, found by name, and right after any roll-back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import evaluated, raw_config

import mtraining.train.loop as loop
from mtraining.errors import UserError
from mtraining.train.checkpoint import Checkpointer
from mtraining.train.config import parse_config
from mtraining.train.evaluation import Evaluation
from mtraining.train.export import export_run
from mtraining.train.metrics import read_metrics
from mtraining.train.named import find_model
from mtraining.train.store import CheckpointStore


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Sets what evaluations find, by step."""

    def script(losses: dict[int, float]) -> None:
        run = Evaluation.run

        def say(self: Evaluation, step: int, stopped: Any, progress: Any) -> Any:
            record = run(self, step, stopped, progress)
            assert record is not None
            record["held_out_loss"] = self.losses[step] = losses[step]
            return record

        monkeypatch.setattr(Evaluation, "run", say)

    return script


def saved(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in CheckpointStore(folder).complete()]


def best_config(folder: Path, shards: Path, unseen: Path, **checkpoint: Any) -> dict[str, Any]:
    return raw_config(
        folder, shards, checkpoint={"every": 4, "keep_last": 1, **checkpoint},
        train={"steps": 8, "batch_size": 1, "micro_batch_size": 1},
        evaluate={"data": str(unseen), "every": 2, "max_sequences": 1, "keep_best": True},
    )  # fmt: skip


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_best_checkpoint_is_saved_kept_and_found_by_name(
    tmp_path: Path,
    shards: Path,
    unseen: Path,
    scripted: Callable[[dict[int, float]], None],
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:
    """The lowest loss comes after step 2, where nothing else would save; weights of step 0 do not count."""
    scripted({0: 0.5, 2: 1.0, 4: 3.0, 6: 1.0, 8: float("nan")})
    folder = tmp_path / "run"
    steps: list[int] = []
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda self, step: (steps.append(step), save(self, step))[1])
    loop.train(parse_config(best_config(folder, shards, unseen, **{"async": asynchronous})))
    # At 6 it is as low as it was at 2, which is not lower.
    assert steps == [2, 4, 8] and saved(folder) == [2, 8]
    assert (folder / "best").is_symlink()
    named = find_model(str(folder / "best"))
    assert named.run is not None and named.checkpoint is not None
    assert named.checkpoint.resolve() == CheckpointStore(folder).path(2)
    export_run(folder, tmp_path / "out", checkpoint="best")
    built = named.build("float32", torch.device("cpu"))
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    newest = find_model(str(folder)).build("float32", torch.device("cpu"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(built.state_dict()[name], exported.state_dict()[name])
    assert not torch.equal(built.state_dict()[name], newest.state_dict()[name])


def test_going_back_to_the_best_begins_another_line(
    tmp_path: Path, shards: Path, unseen: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    losses = {0: 9.0, 2: 2.0, 4: 1.0, 6: 3.0, 8: 4.0}
    scripted(losses)
    loop.train(parse_config(best_config(tmp_path, shards, unseen, keep_last=9)))
    assert saved(tmp_path) == [2, 4, 8] and (tmp_path / "best").resolve().name == "step_00000004"
    losses |= {6: 0.5, 8: 0.7}
    loop.train(parse_config(best_config(tmp_path, shards, unseen, keep_last=9, resume="best")))
    assert saved(tmp_path) == [2, 4, 6, 8] and (tmp_path / "best").resolve().name == "step_00000006"
    assert [one["step"] for one in evaluated(read_metrics(tmp_path))] == [0, 2, 4, 6, 8]
    assert (tmp_path / "checkpoints" / "left_behind_1" / "step_00000008").is_dir()
    # Back to before the best one: it is left behind, and another one takes its place.
    raw = best_config(tmp_path, shards, unseen, keep_last=9, resume="step_00000004")
    raw["train"]["steps"] = 5
    losses[5] = 7.0
    loop.train(parse_config(raw))
    assert saved(tmp_path) == [2, 4, 5] and (tmp_path / "best").resolve().name == "step_00000004"


def test_a_resumed_run_keeps_the_best_before_its_own_first_evaluation(
    tmp_path: Path, shards: Path, unseen: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    scripted({0: 9.0, 2: 1.0, 4: 2.0, 8: 3.0})
    raw = best_config(tmp_path, shards, unseen)
    raw["train"]["steps"] = 4
    loop.train(parse_config(raw))
    raw = best_config(tmp_path, shards, unseen, every=1)
    raw["evaluate"]["every"] = 8
    loop.train(parse_config(raw))
    assert saved(tmp_path) == [2, 8] and (tmp_path / "best").resolve().name == "step_00000002"


def test_losses_of_other_text_are_not_compared(
    tmp_path: Path, shards: Path, unseen: Path, scripted: Callable[[dict[int, float]], None]
) -> None:
    losses = {0: 9.0, 2: 1.0, 4: 2.0, 6: 5.0, 8: 6.0}
    scripted(losses)
    raw = best_config(tmp_path, shards, unseen)
    raw["train"]["steps"] = 4
    loop.train(parse_config(raw))
    assert saved(tmp_path) == [2, 4]
    raw = best_config(tmp_path, shards, unseen)
    raw["evaluate"]["max_sequences"] = 2
    loop.train(parse_config(raw))
    assert saved(tmp_path) == [6, 8] and (tmp_path / "best").resolve().name == "step_00000006"


def test_a_best_that_is_absent_is_named(tmp_path: Path, shards: Path) -> None:
    loop.train(parse_config(raw_config(tmp_path, shards, train={"steps": 2})))
    with pytest.raises(UserError, match="has no best checkpoint; one is kept where evaluate.keep_best=true"):
        find_model(str(tmp_path / "best"))
    with pytest.raises(UserError, match="checkpoint .*best does not exist"):
        export_run(tmp_path, tmp_path / "out", checkpoint="best")
    with pytest.raises(UserError, match="checkpoint .*best does not exist"):
        loop.train(parse_config(raw_config(tmp_path, shards, checkpoint={"resume": "best"})))
