"""Our samples for lm-evaluation-harness: one function a task, named as the task is (see the YAML files beside this).

``--metadata`` gives ``tokenizer`` (a folder or hub id; else the model's own), ``max_seq_lengths`` (a list, default
4096), ``samples`` (default 100), ``seed`` (default 42), and the files that some tasks need: ``essays``, ``squad``,
``hotpotqa``, ``infinitebench``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.evaluate.tasks import SUITES, SampleMaker, Sources, build_tasks


def __getattr__(name: str) -> Callable[..., Any]:
    """The maker of a task's data set, as the harness looks it up by ``!function samples.NAME``."""
    if name.startswith("_"):
        raise AttributeError(name)
    return partial(_data, name)


def _data(task_name: str, **options: Any) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    source = options.get("tokenizer") or options.get("pretrained") or options.get("model")
    if not isinstance(source, str):
        raise UserError(
            'lm-eval: our tasks fit samples to a tokenizer; give --metadata \'{"tokenizer": "FOLDER"}\'.'
        )
    paths: dict[str, Any] = {
        key: Path(options[key])
        for key in ("essays", "squad", "hotpotqa", "infinitebench")
        if options.get(key)
    }
    (task,) = build_tasks(SUITES, [task_name], Sources(**paths))
    maker = SampleMaker(
        AutoTokenizer.from_pretrained(source, trust_remote_code=False), seed=int(options.get("seed", 42))
    )
    rows = []
    for length in options.get("max_seq_lengths", [4096]):
        count = int(options.get("samples", 100))
        for number in range(count if task.samples is None else min(count, task.samples)):
            sample = maker.make(task, int(length), number)
            rows.append(
                {
                    "prompt": sample.draft.prompt + sample.draft.cue,
                    "references": list(sample.draft.references),
                    "task": task_name,
                    "length": int(length),
                }
            )
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The task's own score, over all lengths and under the name of its length."""
    (task,) = build_tasks(SUITES, [doc["task"]])
    value = task.score(results[0], doc["references"])
    return {"score": value, str(doc["length"]): value}
