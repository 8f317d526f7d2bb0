"""Predicted memory against what torch's allocator counts in a real step, and `mtraining train --dry-run`."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import MemoryCase, measured
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from distributed import ProcessPool
from mtraining.bench.train.cases import SHAPES
from mtraining.bench.train.model import build_model as build_bench_model
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model.logits import PLAIN, Head
from mtraining.model.loss import chunked_cross_entropy, chunked_token_losses, chunked_token_scores
from mtraining.model.recompute import PARTS, LayerPolicy
from mtraining.pattern import build_pattern
from mtraining.predict.memory import GIB, Prediction, Unpredictable, Workload, columns_of, predict
from mtraining.predict.trace import META, LiveBytes
from mtraining.train.config import load_config
from mtraining.train.memory_report import MemoryLog, predict_config

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RECIPE = Path(__file__).parents[2] / "recipes" / "qwen2.5-3b-512k.yaml"
FOUR = ["parallel.cp=4", "parallel.cp_outer=1"]

# Each makes another part of the formula the largest: layers, kept tensors, everything, dense pieces, ring of rings,
# parameters, the loss, gradients over micro-batches, fp32, deep models, untied embeddings.
PRODUCTS = LayerPolicy(frozenset(PARTS))
ATTENTION, INNER = LayerPolicy(frozenset({"attention"})), LayerPolicy(frozenset({"attention", "mlp"}))
NOTHING, EVERYTHING = LayerPolicy(), LayerPolicy(everything=True)
CASES = {
    "full": MemoryCase(),
    "keep_attention": MemoryCase(recompute="keep_attention", layers=8),
    "none": MemoryCase(recompute="none"),
    "dense": MemoryCase(pattern="dense"),
    "alone": MemoryCase(world=1, seq_len=2048),
    "hierarchical": MemoryCase(world=4, cp_outer=2),
    "parameters": MemoryCase(hidden=512, mlp=2048, seq_len=512),
    "loss": MemoryCase(vocab=16384, seq_len=1024),
    "accumulation": MemoryCase(dp=2, accumulation=2, seq_len=2048),
    "fp32": MemoryCase(dtype=torch.float32, seq_len=2048),
    "deep": MemoryCase(layers=12, mlp=256),
    "shallow": MemoryCase(layers=1, mlp=2048, seq_len=1024),
    "untied": MemoryCase(tied=False, vocab=8192),
    "grid": MemoryCase(world=4, dp=2, accumulation=2, batch=2, seq_len=2048),
    "dense, everything kept": MemoryCase(pattern="dense", recompute="none", batch=2),
    "experts": MemoryCase(experts=4, mlp=128, seq_len=2048),
    "experts, fp32": MemoryCase(
        experts=4, mlp=128, seq_len=2048, dtype=torch.float32, recompute="keep_attention"
    ),
    "capped logits": MemoryCase(vocab=16384, seq_len=1024, cap=15.0),
    "attention sinks": MemoryCase(sinks=True, mlp=128, seq_len=2048),
    "adapter": MemoryCase(lora=8, hidden=512, mlp=2048, seq_len=512),
    "adapter, long": MemoryCase(lora=16, layers=8),
    "adapter, everything kept": MemoryCase(lora=16, recompute="none"),
    "moments in 8 bits": MemoryCase(hidden=512, mlp=2048, seq_len=512, optimizer_state="8bit"),
    "windows": MemoryCase(window=100, layers=6, mlp=256),
    "hierarchical, kept": MemoryCase(world=4, cp_outer=2, recompute="keep_attention", layers=8),
    "mixed": MemoryCase(recompute=(NOTHING, ATTENTION, INNER, PRODUCTS, EVERYTHING), layers=5),
    "mixed, most kept first": MemoryCase(
        recompute=(EVERYTHING, PRODUCTS, INNER, ATTENTION, NOTHING), layers=5
    ),
    "products": MemoryCase(recompute=(PRODUCTS,) * 6, layers=6, mlp=1024),
    "mixed, hierarchical": MemoryCase(
        recompute=(NOTHING, INNER, INNER, EVERYTHING), world=4, cp_outer=2, accumulation=2
    ),
    "mixed, experts": MemoryCase(
        recompute=(NOTHING, INNER, PRODUCTS, EVERYTHING), experts=4, mlp=128, seq_len=2048
    ),
    "mixed, adapter": MemoryCase(recompute=(NOTHING, ATTENTION, PRODUCTS, EVERYTHING), lora=16),
}


# Where the layers, the parameters, the loss and an adapter are the largest, and where layers keep different things.
FAST = ("full", "parameters", "loss", "adapter", "mixed")
# Every option once, and both grids. The sweep has the others.
SLOW = (
    "keep_attention", "alone", "hierarchical", "accumulation", "dense, everything kept", "experts", "attention sinks",
    "moments in 8 bits", "windows", "products", "mixed, hierarchical",
)  # fmt: skip


def marked(name: str) -> Any:
    marks = [pytest.mark.slow] * (name not in FAST) + [pytest.mark.sweep] * (name not in FAST + SLOW)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_prediction_is_within_a_tenth_of_what_is_measured(pool: ProcessPool, name: str) -> None:
    case = CASES[name]
    # Ranks have equal shares; gloo's threads, which no GPU has, keep copies of what they sum a moment longer on some.
    found = min(pool.run(measured, case.world, case=case))
    assert case.predicted().peak == pytest.approx(found, rel=0.10)


def test_cases_have_their_peaks_at_different_moments() -> None:
    moments = {name: case.predicted().moment for name, case in CASES.items()}
    assert moments["loss"] == "in the loss" and moments["parameters"] == "in the first layer's backward"
    assert moments["keep_attention"] == "in the last layer's backward"


def test_dense_layers_and_steps_count() -> None:
    def attention(*options: str) -> float:
        return predict_config(load_config(RECIPE, [*FOUR, "pattern.max_columns=128", *options])).attention

    plain, dense = attention(), attention("pattern=dense")
    assert dense > 1.1 * plain
    for option in (
        "pattern.anneal={dense_every: 10}",
        "pattern.anneal={dense_first: 1}",
        "pattern.dense_layers=2",
    ):
        assert attention(option) == pytest.approx(dense, rel=1e-3), option
    assert attention("pattern.anneal={widen: 64, widen_steps: 100}") > plain


def test_components_add_up_and_scale() -> None:
    case = CASES["keep_attention"]
    found = case.predicted()
    assert found.peak == pytest.approx(max(found.moments.values()))
    lse = 4 * 4 * case.seq_len // 2  # fp32, four heads
    outputs = case.layers * (2 * case.hidden * case.seq_len // 2 + lse)
    assert found.components["kept: attention outputs"] == outputs
    inputs = case.layers * 2 * case.hidden * case.seq_len // 2
    assert found.components["kept: layer inputs"] == pytest.approx(inputs, rel=0.05)
    # Queries, keys, values, what follows attention, gate and up; not the last product, which nobody needs.
    products = replace(case, recompute=(PRODUCTS,) * case.layers).predicted().components
    wide = 3 * case.hidden + 2 * case.mlp
    assert products["kept: products of matrices"] == case.layers * 2 * wide * case.seq_len // 2
    assert products["kept: attention outputs"] == outputs
    assert "kept: attention outputs" not in replace(case, recompute="full").predicted().components
    assert 0 < found.attention < found.components["working set of a layer"]


def alone(case: MemoryCase, fused: str = "none", offload: bool = False, model: Any = None) -> Prediction:
    """Of one process, with what a CPU cannot do, or of another model than the case's."""
    work = Workload(
        model or case.model("meta"), 1, (1, 1), case.seq_len, 1, 1, [case.build()], build_layout("striped", 16),
        case.recompute, offload, fused, case.dtype, case.loss_chunk,
    )  # fmt: skip
    return predict(work)


def of_model(config: Any) -> Prediction:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return alone(MemoryCase(seq_len=1024, recompute="none"), model=model)


def test_the_largest_layers_count_where_experts_begin_after_the_first() -> None:
    def model(dense: int) -> Any:
        return AutoConfig.for_model(
            "glm4_moe", vocab_size=260, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=8,
            num_experts_per_tok=4, n_shared_experts=1, n_group=1, topk_group=1, pad_token_id=0,
            first_k_dense_replace=dense,
        )  # fmt: skip

    kept = [of_model(model(dense)).components["kept: everything"] for dense in (0, 2, 3)]
    assert kept[0] == kept[1] > 2 * kept[2]


def test_options_of_each_layer_are_those_of_the_layer_that_is_traced() -> None:
    config = AutoConfig.for_model(
        "smollm3", vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, no_rope_layers=[0],
    )  # fmt: skip
    assert of_model(config).peak > 0


def test_offload_leaves_three_layers_and_fusion_halves_the_layer() -> None:
    case = MemoryCase(layers=12, mlp=2048, seq_len=32768, vocab=512)
    plain, away, fused = alone(case), alone(case, offload=True), alone(case, fused="liger")
    backward = "in the last layer's backward"
    kept = 2 * case.hidden * case.seq_len
    assert plain.moments[backward] - away.moments[backward] == pytest.approx(9 * kept, rel=0.02)
    name = "working set of a layer"
    assert 0.4 < fused.components[name] / plain.components[name] < 0.75


@pytest.mark.parametrize(
    "name", ["train-h100x2-2026-11-28-1157c4e.csv", "train-h100x2-2026-11-28-tensorwise.csv"]
)
def test_float8_takes_what_was_measured_on_gpus(name: str) -> None:
    """The prediction of today beside the peaks of two H100, also with whole layers compiled."""
    with (RESULTS / name).open() as file:
        rows = [row for row in csv.DictReader(file) if (row["fused"], row["float8"]) != ("liger", "off")]
    rows = [row for row in rows if row["recompute"] == "keep_attention"]
    assert rows
    for row in rows:
        shape, tokens = SHAPES[row["model"]], int(row["seq_len"])
        model = build_bench_model(shape, tokens, int(row["layers"]), torch.device("meta"))
        work = Workload(
            model, world=2, ring=(1, 2), seq_len=tokens, batch=1, accumulation=1,
            patterns=[build_pattern("vertical_slash")], layout=build_layout(row["layout"], shape.block_size),
            recompute=row["recompute"], offload=False, fused=row["fused"], compute=torch.bfloat16, float8=row["float8"],
        )  # fmt: skip
        assert predict(work).peak / GIB == pytest.approx(float(row["peak_gib"]), rel=0.01), row


def test_the_loss_takes_what_it_takes_on_a_gpu() -> None:
    """Compiled it works in one chunk of logits. The gradient of the head is made in fp32 before it is added."""
    rows, chunk, vocab, width = 768, 256, 4096, 64
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device=META, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64, device=META)
    live = LiveBytes()
    with live:
        live.begin("loss")
        chunked_cross_entropy(hidden, weight, labels, 1, chunk, compiled=True)
    logits, head, of_hidden = 2 * chunk * vocab, 4 * vocab * width, 2 * rows * width
    given = hidden.nbytes + weight.nbytes + labels.nbytes
    assert live.peaks["loss"] == pytest.approx(given + logits + 2 * head + of_hidden, rel=0.01)


@pytest.mark.parametrize("function", [chunked_token_losses, chunked_token_scores])
def test_losses_of_tokens_have_the_logits_of_one_chunk(function: Callable[..., Any]) -> None:
    rows, chunk, vocab, width = 768, 256, 4096, 64
    hidden, weight = torch.empty(rows, width, device=META), torch.empty(vocab, width, device=META)
    labels = torch.zeros(rows, dtype=torch.int64, device=META)
    live = LiveBytes()
    with live:
        live.begin("losses")
        function(hidden, Head(weight, None, PLAIN), labels, chunk)
    # logsumexp makes a copy of its input.
    assert live.peaks["losses"] < weight.nbytes + hidden.nbytes + 2.2 * 4 * chunk * vocab


def test_capacity_of_the_columns_of_every_kind_of_pattern() -> None:
    wanted = {
        "vertical_slash": 4096,
        "dense": 0,
        "toeplitz_random": 2048,
        "a_shape": 1024,
        "moba": 0,
        "flexprefill": 4096,
        "xattention": 0,
    }
    assert {name: columns_of(build_pattern(name), 1 << 20) for name in wanted} == wanted
    assert columns_of(build_pattern("vertical_slash"), 1000) == 1000


def test_a_large_model_is_predicted_in_seconds_and_fits_the_target() -> None:
    start = time.process_time()
    for recompute in ("full", "keep_attention"):
        config = load_config(RECIPE, [*FOUR, f"train.recompute={recompute}"])
        found = predict_config(config)
        assert 40 * GIB < found.peak < 100 * GIB  # 512K tokens on four GPUs
        assert found.components["parameters (shard)"] == pytest.approx(3.0859e9 * 4 / 4, rel=0.01)
    assert time.process_time() - start < 10


def dry_run(*options: str) -> Any:
    sets = [part for option in FOUR for part in ("--set", option)]
    return CliRunner().invoke(app, ["train", str(RECIPE), "--dry-run", *sets, *options])


def test_dry_run_prints_components_and_what_fits() -> None:
    told = dry_run("--memory-gib", "139")
    assert told.exit_code == 0, told.output
    for part in (
        "parameters (shard)",
        "optimizer state",
        "kept: layer inputs",
        "working set of a layer",
        "fits into",
    ):
        assert part in told.output
    assert not (Path("runs") / "qwen2.5-3b-512k").exists()


def test_readmes_dry_run() -> None:
    told = CliRunner().invoke(app, ["train", str(RECIPE), "--dry-run", "--memory-gib", "80"])
    assert told.exit_code == 0 and "32 GPUs" in told.output and "fits into 80.0 GiB" in told.output


def test_dry_run_tells_where_little_is_left() -> None:
    """Between what a step needs and what it wants, it fits but may run short."""
    spacious, scarce = dry_run("--memory-gib", "139"), dry_run("--memory-gib", "50")
    assert scarce.exit_code == 0, scarce.output
    assert "with little left: PyTorch may give memory back" in " ".join(scarce.output.split())
    assert "with little left" not in spacious.output


def test_dry_run_refuses_what_cannot_fit() -> None:
    told = dry_run("--memory-gib", "40")
    assert isinstance(told.exception, UserError)  # which the command turns into exit status 2
    sentence = str(told.exception)
    for remedy in ("train.recompute=full", "train.offload=true", "parallel.cp", "train.seq_len"):
        assert remedy in sentence
    assert "40.0 GiB" in sentence and sentence.count(". ") == 0


def test_a_fit_leaves_room_for_memory_that_breaks_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-3B's shape on two H200s, dense: ran with expandable segments, ran out of memory without them."""
    options = [
        "parallel.cp=2", "parallel.cp_outer=1", "pattern=dense", "layout.name=zigzag", "train.fused=liger",
        "train.recompute=keep_attention", "train.batch_size=1",
    ]  # fmt: skip
    found, memory = predict_config(load_config(RECIPE, options)), 139.8 * GIB
    assert found.peak == pytest.approx(118 * GIB, rel=0.01)
    found.check(memory)
    assert found.needed > 118.4 * GIB
    assert dict(found.table())["needed"] == found.needed
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    with pytest.raises(
        UserError, match="use PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, train.recompute"
    ):
        found.check(memory)
    assert found.reserve > 20 * GIB


def test_dry_run_without_a_gpu_says_how_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = dry_run()
    assert told.exit_code == 0 and "--memory-gib" in told.output


def test_memory_without_dry_run_is_refused() -> None:
    told = CliRunner().invoke(app, ["train", str(RECIPE), "--memory-gib", "80"])
    assert isinstance(told.exception, UserError) and "--dry-run" in str(told.exception)


def test_a_sequence_that_cannot_be_dealt_is_refused() -> None:
    told = dry_run("--set", "train.seq_len=524300")
    assert isinstance(told.exception, UserError) and "524" in str(told.exception)


def test_the_log_tells_what_is_predicted_and_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(RECIPE, [*FOUR, "model.config.num_hidden_layers=2"])
    told: list[str] = []
    state = torch.get_rng_state()
    log = MemoryLog(config, None, torch.device("cuda"), told.append)
    assert torch.equal(state, torch.get_rng_state())  # or ranks that do not tell would draw other numbers
    assert len(told) == 1 and "working set of a layer" in told[0] and "optimizer state (shard)" in told[0]
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: 2 * int(predict_config(config).peak)
    )
    for step in range(3):
        log.step_done(step + 1, {})
    assert len(told) == 2 and "measured" in told[1] and "2.00 of what was predicted" in told[1]


@pytest.mark.parametrize(
    ("counted", "said"),
    [
        ([5, 5, 5], []),
        ([0, 2, 7], ["short 2 times up to step 20"]),
        ([5, None, 6], ["short 1 times up to step 30"]),
    ],
)
def test_a_run_short_of_memory_says_so_once(
    counted: list[int | None], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps compile and allocate what stays: what they were short of is passed over."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: GIB)
    told: list[str] = []
    log = MemoryLog(load_config(RECIPE, FOUR), None, torch.device("cuda"), told.append)
    for number, count in enumerate(counted):
        log.step_done(10 * (number + 1), {} if count is None else {"memory_shortages": count})
    short = [line for line in told if "memory ran short" in line]
    assert len(short) == len(said) and all(words in line for words, line in zip(said, short, strict=True))


def test_a_model_that_reads_numbers_runs_unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = AutoConfig.for_model(
        "jetmoe", vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2,
        kv_channels=16, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(
        Unpredictable, match="memory cannot be predicted for jetmoe, whose own code reads numbers"
    ):
        of_model(routed)

    def predicted(*_: Any) -> Prediction:
        raise Unpredictable("memory cannot be predicted")

    monkeypatch.setattr("mtraining.train.memory_report.predict_config", predicted)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    told: list[str] = []
    log = MemoryLog(load_config(RECIPE, FOUR), None, torch.device("cuda"), told.append)
    for step in range(2):
        log.step_done(step + 1, {})
    assert told == ["memory cannot be predicted", "memory a GPU, measured: 3.00 GiB"]
