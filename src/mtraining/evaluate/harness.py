"""lm-evaluation-harness both ways: our ring as a model of theirs, and (`TASK_FOLDER`) our tasks among theirs.

The harness is Apache-licensed and optional: install mtraining[lm-eval]. Its own long-context tasks differ from the
papers in places that docs/evaluation.md lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mtraining.errors import UserError
from mtraining.evaluate.perplexity import whole_document_nll
from mtraining.generate import Generator

TASK_FOLDER = Path(__file__).parent / "harness_tasks"
"""What the harness takes as its ``include_path``: every task of ours as ``mtraining_NAME``."""


def harness_model(generator: Generator, batch: int = 1) -> Any:
    """A generator as a model of the harness, for the ``model`` of its simple_evaluate.

    All ranks of the generator's ring must ask the same, as they do when each of them runs the harness.

    Args:
        generator: with a tokenizer.
        batch: prompts answered together.

    Raises:
        UserError: lm-evaluation-harness is missing, or the generator has no tokenizer.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise UserError("--suite lm-eval needs lm-evaluation-harness; install mtraining[lm-eval].") from None
    if generator.tokenizer is None:
        raise UserError("--suite lm-eval: the harness asks in text, so the model needs a tokenizer.")

    class RingModel(TemplateLM):  # type: ignore[misc,unused-ignore]
        """Answers the harness's requests; nothing is truncated, what is too long is refused."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = generator.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(generator.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            begin = generator.tokenizer.bos_token_id
            return self.eot_token_id if begin is None else int(begin)

        @property
        def tokenizer_name(self) -> str:
            return str(generator.tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = True if add_special_tokens is None else add_special_tokens
            return list(generator.tokenizer(string, add_special_tokens=special, verbose=False).input_ids)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            text: str = generator.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            found = []
            for _, context, continuation in requests:
                scores = generator.score(context + continuation)
                tail = slice(len(scores.nll) - len(continuation), None)
                found.append((-float(scores.nll[tail].double().sum()), bool(scores.greedy[tail].all())))
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Windows of the model's positions that share one token; the first token follows the prefix token."""
            longest = int(generator.model.hf_model.config.max_position_embeddings)
            totals = []
            for request in requests:
                (text,) = request.args
                tokens = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
                totals.append(-whole_document_nll(generator, tokens, longest)[0])
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answers: list[str] = [""] * len(requests)
            groups: dict[tuple[Any, ...], list[int]] = {}
            for place, request in enumerate(requests):
                groups.setdefault(_how(request.args[1]), []).append(place)
            for (limit, stop, temperature, top_p), places in groups.items():
                for start in range(0, len(places), batch):
                    chosen = places[start : start + batch]
                    prompts = [self.tok_encode(requests[place].args[0]) for place in chosen]
                    found = generator.generate(
                        prompts, limit, temperature=temperature, top_p=top_p, stop=stop
                    )
                    for place, one in zip(chosen, found, strict=True):
                        answers[place] = one.text or ""
            return answers

    return RingModel()


def _how(options: dict[str, Any]) -> tuple[int, tuple[str, ...], float, float]:
    """Token limit, stop strings, temperature and top-p of a request of the harness.

    Raises:
        UserError: an option that decoding here does not have.
    """
    given = dict(options)
    until = given.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else tuple(string for string in until if string)
    limit = int(given.pop("max_gen_toks", given.pop("max_new_tokens", 256)))
    sample = bool(given.pop("do_sample", given.get("temperature", 0.0) > 0))
    temperature = float(given.pop("temperature", 1.0 if sample else 0.0) or 0.0)
    top_p = float(given.pop("top_p", 1.0) or 1.0)
    if given:
        raise UserError(
            f"lm-eval: generation option {next(iter(given))} is not available on the ring; leave it out of the task."
        )
    return limit, stop, temperature if sample else 0.0, top_p


def run_harness(
    generator: Generator,
    tasks: Sequence[str],
    batch: int,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Results of ``lm_eval.simple_evaluate`` on some of its tasks, ours included.

    Tasks that make their own data load a tokenizer by name. They are given a folder with the generator's own, so the
    model may be of any kind.

    Args:
        metadata: for tasks that make their own data, as ``lm_eval --metadata`` takes it.
        options: passed on, such as ``limit``.
    """
    model = harness_model(generator, batch)
    with TemporaryDirectory() as folder:
        generator.tokenizer.save_pretrained(folder)
        return _evaluated(model, tasks, (metadata or {}) | {"tokenizer": folder}, options)


def _evaluated(
    model: Any, tasks: Sequence[str], metadata: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASK_FOLDER), metadata=metadata)
    try:
        found = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
        )
    except (KeyError, ValueError) as error:
        known = {*manager.all_tasks}
        missing = [task for task in tasks if task not in known]
        if not missing:
            raise
        raise UserError(f"--suite lm-eval:{missing[0]} is not a task of the harness ({error}).") from None
    return dict(found["results"])
