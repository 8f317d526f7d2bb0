"""The needle grid: one sample a depth, at that depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtraining.errors import UserError
from mtraining.evaluate.tasks import SampleMaker, Sources, build_tasks


@pytest.mark.parametrize("name, needles", [("needle_numbers", 1), ("needle_words", 1), ("needle_several", 3)])
def test_needles_stand_at_their_depth(name: str, needles: int, essays: Path, maker: SampleMaker) -> None:
    (task,) = build_tasks(["needle"], [name], Sources(essays, depths=5))
    for number in range(10):
        sample = maker.make(task, 8192, number)
        depth = number % 5 / 4
        assert sample.draft.details["depth"] == depth
        context = sample.draft.prompt.split("\n\n")[1]
        places = [context.index(f": {value}.") / len(context) for value in sample.draft.references]
        assert places == pytest.approx([depth + (1 - depth) * i / needles for i in range(needles)], abs=0.03)
        assert task.score(" and ".join(sample.draft.references), sample.draft.references) == 1.0


def test_a_missing_haystack_is_said(tmp_path: Path, maker: SampleMaker) -> None:
    (task,) = build_tasks(["needle"], ["needle_words"], Sources(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--essays .*nowhere does not exist"):
        maker.make(task, 2048, 0)
    with pytest.raises(UserError, match="holds no .txt file"):
        maker.make(build_tasks(["needle"], ["needle_words"], Sources(tmp_path))[0], 2048, 0)
