"""A whole training step on a GPU: fused and offloaded layers give eager numbers, and the host waits once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from library_warnings import COMPILE, SYNC_CHECKS
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, parallelize
from mtraining.model.loss import chunked_cross_entropy
from mtraining.model.recompute import PARTS, LayerPolicy
from mtraining.pattern import VerticalSlash
from mtraining.train.mesh import Process
from mtraining.train.optim import build_optimizer
from mtraining.train.step import Batch, Stepper, StepResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(*COMPILE, SYNC_CHECKS),
]
SEQ_LEN, VOCAB = 4096, 1000
# Relative, of loss and gradient norm: of the first step, which rounds otherwise at the same weights, and of those after
# it. Norms and gates off by one rounding (qwen3, six seeds, CPU) stay within 6e-5, 4e-3 and 2.2e-4, 1.1e-2; a key norm
# left out, an eps of 1e-3, and a query norm that returns no gradient do not.
FUSED_TOLERANCE = ((2e-4, 1e-2), (1e-3, 2e-2))


class Options:
    """What a step and its optimizer read of the `train` section.

    The learning rate is small: at 1e-3 without warm-up qwen3's third step overshoots (gradient norm 1.2 -> 7.3), where
    one rounding of bf16 in a norm or a gate moves the loss by up to 1.3e-3. At 1e-4 the same moves it by 2e-4.
    """

    seq_len, steps, warmup_steps, schedule = SEQ_LEN, 10, 0, "constant"
    decay_steps, decay = None, "cosine"
    lr, min_lr, weight_decay, betas, eps, clip = 1e-4, 0.0, 0.1, (0.9, 0.95), 1e-8, 1.0
    optimizer_state = "full"


def make(process: Process, family: str = "qwen2", **options: Any) -> ParallelLM:
    """Three layers in bf16, sharded over one process, the same weights each time."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=SEQ_LEN,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    pattern = VerticalSlash(
        top_p=None, top_k_columns=300, slash_by="block", slash_density=0.2, probe_at="spread"
    )
    return parallelize(
        model,
        process.mesh,
        pattern=pattern,
        layout=build_layout("striped"),
        param_dtype=torch.bfloat16,
        **options,
    )


def batches() -> Iterator[Batch]:
    tokens = torch.randint(VOCAB, (1, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(SEQ_LEN)[None]
    batch = {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": positions,
    }
    while True:
        yield {name: x.pin_memory() for name, x in batch.items()}


def steps(
    process: Process, count: int, family: str = "qwen2", **options: Any
) -> tuple[list[StepResult], ParallelLM]:
    model = make(process, family, **options)
    settings = cast(Any, Options())
    stepper = Stepper(
        model, build_optimizer(model, settings, process.device), settings, process, accumulation=1
    )
    data = batches()
    return [stepper.run(data, step) for step in range(count)], model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"recompute": "none"}),
        ("qwen2", {"recompute": "keep_attention"}),
        ("qwen2", {"recompute": "full", "offload": True}),
        ("qwen2", {"recompute": "keep_attention", "offload": True}),
        ("qwen2", {"recompute": "keep_attention", "fused": "compile"}),
        ("qwen2", {"recompute": "full", "fused": "compile", "offload": True}),
        ("qwen2", {"recompute": "keep_attention", "fused": "liger", "offload": True}),
        ("qwen3", {"recompute": "keep_attention", "fused": "liger"}),
        ("llama", {"recompute": "none", "fused": "liger"}),
    ],
    ids=str,
)
def test_every_way_learns_the_same(process: Process, family: str, options: dict[str, Any]) -> None:
    if options.get("fused") == "liger":
        pytest.importorskip("liger_kernel")
    expected, _ = steps(process, 3, family, recompute="full")
    found, _ = steps(process, 3, family, **options)
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        loss, norm = (0.0, 0.0) if "fused" not in options else FUSED_TOLERANCE[min(step, 1)]
        assert other.loss == pytest.approx(one.loss, rel=loss, abs=0), step
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=norm, abs=0), step


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "full"},
        {"recompute": "keep_attention", "offload": True},
        {"recompute": "keep_attention", "fused": "compile", "offload": True},
        {"recompute": 2 * [LayerPolicy(frozenset(PARTS), offload=True)] + [LayerPolicy(everything=True)]},
    ],
    ids=str,
)
@pytest.mark.parametrize("observe", [False, True])
def test_the_host_waits_once_a_step(process: Process, options: dict[str, Any], observe: bool) -> None:
    """An observed step reads its telemetry after that one wait, when the device has all of the step to do."""
    model, settings = make(process, **options), cast(Any, Options())
    stepper = Stepper(
        model, build_optimizer(model, settings, process.device), settings, process, accumulation=1
    )
    data = batches()
    pieces = [next(data) for _ in range(3)]
    for step in range(2):
        stepper.run(iter([pieces[step]]), step, observe=observe, recall_rows=8)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            stepper.run(iter([pieces[2]]), 2, observe=observe, recall_rows=8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert "train/step.py" in waits[0], waits
    assert observe or len(waits) == 1, waits


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vocab", [1000, 151_936])
def test_the_loss_in_bf16(compiled: bool, vocab: int) -> None:
    """Against fp32 on the same bf16 inputs; the last chunk is a short one."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 1100, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, 256, device="cuda") * 0.1).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (1, 1100), device="cuda")
    labels[0, 100:140] = -100
    found = chunked_cross_entropy(hidden, weight, labels, 1060, 512, compiled=compiled)
    gradients: list[Tensor] = list(torch.autograd.grad(found, (hidden, weight)))
    logits = hidden[0].float() @ weight.float().T
    expected = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum") / 1060
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert ((gradient - right).float().norm() / right.float().norm()).item() < 1e-2


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"labels": -1}, r"labels: 4096 of them \(such as -1\)"),
        ({"labels": VOCAB}, r"labels: 4096 of them \(such as 1000\)"),
        ({"position_ids": SEQ_LEN // 2}, "position_ids are not .*: local token 2048 has 0, not 2048"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", ["none", "compile", "liger"])
def test_inputs_that_cannot_be_trained_on_change_nothing(
    process: Process, fused: str, fault: dict[str, int], sentence: str
) -> None:
    """After a batch of the same length that is right. No assertion on the device ends the process."""
    if fused == "liger":
        pytest.importorskip("liger_kernel")
    model, settings = make(process, recompute="full", fused=fused), cast(Any, Options())
    stepper = Stepper(
        model, build_optimizer(model, settings, process.device), settings, process, accumulation=1
    )
    right = next(batches())
    stepper.run(iter([right]), 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    wrong = dict(right)
    if "labels" in fault:
        wrong["labels"] = torch.full_like(right["labels"], fault["labels"])
    else:
        wrong["position_ids"] = right["position_ids"] % fault["position_ids"]
    with pytest.raises(UserError, match=f"^step 2, rank 0: {sentence}"):
        stepper.run(iter([wrong]), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_wrong_positions_of_a_direct_call_give_nan() -> None:
    """Of the transformers model itself; nothing waits for the device on the way."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    hf_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    model = parallelize(hf_model, pattern=VerticalSlash(), layout=build_layout("striped"))
    ids = torch.zeros(1, SEQ_LEN, dtype=torch.int64, device="cuda")
    right = torch.arange(SEQ_LEN, device="cuda")[None]
    with torch.no_grad():
        for _ in range(2):  # the first call makes what is kept for the others
            assert model.hf_model(ids, position_ids=right, use_cache=False).logits.isfinite().all()
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = model.hf_model(ids, position_ids=right % 2048, use_cache=False).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert logits.isnan().all()
