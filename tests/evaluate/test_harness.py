"""lm-evaluation-harness both ways, on a tiny model: its requests answered as plain code would, our tasks among its."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from mtraining.data.tokenizer import save_byte_tokenizer
from mtraining.errors import UserError
from mtraining.evaluate.harness import TASK_FOLDER, harness_model, run_harness
from mtraining.evaluate.tasks import SUITES, build_tasks
from mtraining.generate import Generator

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make setup EXTRAS=dev,lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports

POSITIONS = 1024


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def generator(plain: Any, tokenizer_folder: Path) -> Generator:
    return Generator(copy.deepcopy(plain), AutoTokenizer.from_pretrained(tokenizer_folder))


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def log_probs(plain: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return plain(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_likelihoods_are_plain_ones(plain: Any, generator: Generator) -> None:
    model = harness_model(generator)
    found = model.loglikelihood([request("ab", " cd"), request("", "xyz")])
    for (value, _), (context, text) in zip(found, [(b"ab", b" cd"), (None, b"xyz")], strict=True):
        before = list(context) if context else [generator.tokenizer.eos_token_id]
        scores = log_probs(plain, before + list(text))
        expected = sum(float(scores[len(before) + i - 1, token]) for i, token in enumerate(text))
        assert value == pytest.approx(expected, abs=1e-9)
    # What greedy decoding says is greedy, and a letter changed is not.
    (best,) = model.generate_until([request("ab", {"until": [], "max_gen_toks": 1, "do_sample": False})])
    if best:
        ((_, greedy),) = model.loglikelihood([request("ab", best)])
        assert greedy
    other = "q" if best != "q" else "r"
    ((_, greedy),) = model.loglikelihood([request("ab", other)])
    assert not greedy


def test_rolling_foresees_every_token_once(plain: Any, generator: Generator) -> None:
    text = "abcdefgh" * 300  # more than the model's positions
    (found,) = harness_model(generator).loglikelihood_rolling([request(text)])
    tokens = [generator.tokenizer.eos_token_id, *text.encode()]
    expected, counted = 0.0, 0
    for start in range(0, len(tokens) - 1, POSITIONS - 1):
        window = tokens[start : start + POSITIONS]
        scores = log_probs(plain, window)
        expected += sum(float(scores[i, token]) for i, token in enumerate(window[1:]))
        counted += len(window) - 1
    assert counted == len(text) and found == pytest.approx(expected, rel=1e-9)


def test_answers_keep_their_order_and_their_limits(generator: Generator) -> None:
    model = harness_model(generator, batch=2)
    asked = [
        request("one", {"max_gen_toks": 3}),
        request("two", {"max_gen_toks": 5}),
        request("three", {"max_gen_toks": 3}),
    ]
    together = model.generate_until(asked)
    assert together == [model.generate_until([one])[0] for one in asked]
    with pytest.raises(UserError, match="generation option num_beams is not available"):
        model.generate_until([request("x", {"num_beams": 4})])


def test_every_task_has_its_file() -> None:
    names = {task.name for task in build_tasks(SUITES) if not task.scales}
    assert {path.stem for path in TASK_FOLDER.glob("[!_]*.yaml")} == names
    for task in build_tasks(SUITES):
        if not task.scales:
            text = (TASK_FOLDER / f"{task.name}.yaml").read_text()
            assert f"max_gen_toks: {task.new_tokens}," in text


@pytest.mark.slow
def test_our_task_through_the_harness(generator: Generator) -> None:
    metadata = {"max_seq_lengths": [1024], "samples": 2}
    found = run_harness(generator, ["mtraining_passkey"], batch=1, metadata=metadata)
    (result,) = found.values()
    assert result["score,none"] == 0.0 and result["1024,none"] == 0.0  # a random model finds nothing
    with pytest.raises(UserError, match="--suite lm-eval:no_such_task is not a task of the harness"):
        run_harness(generator, ["no_such_task"], batch=1)
