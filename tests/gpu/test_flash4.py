"""flash-attn-4's block-sparse kernels against the fp64 reference, at every head_dim that might be enabled."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch

from mtraining.errors import UserError
from mtraining.kernel import choice, select_backend
from triton_cases import Case, Problem, assert_equal, build, reference, relative_error, solve, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        find_spec("flash_attn") is None, reason="needs flash-attn-4: pip install mtraining[fa4]"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

BF16 = {"size": 128, "dtype": torch.bfloat16}
CASES = {
    "whole": whole(9, q_heads=4, kv_heads=2, columns=300, **BF16),
    "mha, batch": whole(5, q_heads=3, kv_heads=3, batch=2, columns=100, **BF16),
    "group of 3": whole(6, q_heads=9, kv_heads=3, columns=100, **BF16),
    "one block": whole(1, q_heads=2, **BF16),
    "no tile at all": whole(3, q_heads=2, diagonal_share=0.0, **BF16),
    "every tile": whole(8, q_heads=2, diagonal_share=1.0, **BF16),
    "block mask": whole(8, q_heads=4, block_share=0.4, diagonal_share=0.2, **BF16),
    "striped, own keys": Case(range(1, 16, 2), range(1, 16, 2), 16, q_heads=4, **BF16),
    "striped, other keys": Case(range(1, 16, 2), range(0, 16, 2), 16, q_heads=4, **BF16),
    "zigzag, own keys": Case((2, 3, 8, 9), (2, 3, 8, 9), 12, q_heads=2, **BF16),
    "all masked": Case((0, 1), (2, 3), 4, q_heads=2, **BF16),
    "not contiguous": whole(4, q_heads=2, strided=True, **BF16),
    "documents": whole(9, q_heads=4, kv_heads=2, columns=300, starts="anywhere", batch=2, **BF16),
    "documents at blocks": whole(9, q_heads=4, kv_heads=2, columns=0, starts="blocks", batch=2, **BF16),
    "documents of one token": whole(6, q_heads=2, columns=0, starts="tokens", diagonal_share=1.0, **BF16),
    "a narrow window": whole(6, q_heads=2, columns=0, starts="narrow", diagonal_share=1.0, **BF16),
    "a wide window": whole(12, q_heads=4, columns=0, starts="wide", diagonal_share=1.0, **BF16),
    "lists of documents": whole(8, q_heads=4, block_share=0.4, diagonal_share=0.2, starts="anywhere", **BF16),
    "striped documents": Case(
        range(1, 16, 2), range(0, 16, 2), 16, q_heads=4, columns=256, starts="anywhere", **BF16
    ),
    "fp16": whole(6, q_heads=4, kv_heads=2, size=128, dtype=torch.float16),
}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


def problem(case: Case) -> Problem:
    """The columns of a row come in fp32 and the tiles in bf16: both must fit in one tolerance."""
    return build(case, "cuda")


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dim: int) -> None:
    from mtraining.kernel.external.flash4 import (
        Flash4Backend,
    )  # as it is, so that head_dims not yet enabled are tried as well

    case = replace(CASES[name], dim=dim)
    p = problem(case)
    assert_equal(solve(Flash4Backend(), p), reference(p), TOLERANCE[case.dtype])


@pytest.mark.parametrize("dim", [64, 128])
def test_hundred_launches_agree(dim: int) -> None:
    """Atomics change the last bits; a launch that races gives garbage, which one comparison may miss."""
    from mtraining.kernel.external.flash4 import Flash4Backend

    p = problem(whole(16, q_heads=8, kv_heads=2, dim=dim, columns=0, **BF16))
    _, first = solve(Flash4Backend(), p)
    for _ in range(100):
        _, again = solve(Flash4Backend(), p)
        for name in ("out", "dq", "dk", "dv"):
            assert relative_error(again[name], first[name]) < 1e-3, name


def test_merging_several_bf16_partials_stays_within_bf16() -> None:
    """A ring of eight: out is rounded once a step, and the errors do not pile up."""
    from mtraining.kernel.external.flash4 import Flash4Backend

    world, blocks = 8, 64
    p = problem(whole(blocks, q_heads=2, dim=128, columns=0, diagonal_share=0.6, **BF16))
    exact, exact_lse = reference(p)[1]["out"], reference(p)[0]
    steps = Case(range(world - 1, blocks, world), (), blocks, **BF16)
    rows = torch.arange(blocks * 128, device="cuda").view(-1, world, 128)
    mine = rows[:, world - 1].flatten()
    out = lse = None
    for source in range(world):
        keys = rows[:, source].flatten()
        place = build(replace(steps, k_blocks=range(source, blocks, world)), "cuda").place
        out, lse = Flash4Backend().tiles_forward(
            p.q[:, mine], p.k[:, keys], p.v[:, keys], p.index, place, p.scale, out, lse
        )
    assert out is not None and lse is not None
    assert relative_error(out, exact[:, mine]) < 4e-3
    seen = ~exact_lse[..., mine].isneginf()
    assert (lse.double() - exact_lse[..., mine])[seen].abs().max() < 1e-5


@pytest.mark.parametrize("dim", [64, 128])
def test_last_pass_leaves_zeros_where_nothing_is_seen(dim: int) -> None:
    from mtraining.kernel.external.flash4 import Flash4Backend

    p = problem(whole(8, q_heads=4, kv_heads=2, dim=dim, columns=0, diagonal_share=0.2, **BF16))
    step = p.q, p.k, p.v, p.index, p.place, p.scale, None, None
    out, lse = Flash4Backend().tiles_forward(*step)
    last, last_lse = Flash4Backend().tiles_forward(*step, final=True)
    assert torch.equal(last, out.to(last.dtype)) and torch.equal(last_lse, lse)
    unseen = lse.isneginf().transpose(1, 2)
    assert unseen.any() and not last[unseen].any()


@pytest.mark.parametrize("kernel", ["flash4", "triton"])
@pytest.mark.parametrize("merging", [False, True])
def test_nan_goes_through(kernel: str, merging: bool) -> None:
    """Hidden, a run whose activations broke would go on with zeros."""
    p = problem(whole(4, q_heads=2, dim=128, columns=0, diagonal_share=1.0, **BF16))
    p.q[:, 200, 1] = torch.nan
    lse = torch.zeros(p.q.shape[0], p.q.shape[2], p.q.shape[1], device="cuda")
    before = (torch.zeros(p.q.shape, device="cuda"), lse) if merging else (None, None)
    served = select_backend(kernel, p.q.device, p.q.dtype, p.q.shape[-1])
    for final in (False, True):
        given = (None if x is None else x.clone() for x in before)
        out, _ = served.tiles_forward(p.q, p.k, p.v, p.index, p.place, p.scale, *given, final=final)
        assert out[:, 200, 1].isnan().all()
        assert out.isnan().sum() == out[:, 200, 1].numel()


def test_nothing_waits_for_the_device() -> None:
    from mtraining.kernel.external.flash4 import Flash4Backend

    p = problem(whole(8, q_heads=4, kv_heads=2, dim=128, **BF16))
    solve(Flash4Backend(), p)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve(Flash4Backend(), p)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_it_does_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"kernel: 'flash4' takes bfloat16 or float16, not float32"):
        select_backend("flash4", cuda, torch.float32, 128)
    with pytest.raises(UserError, match=r"kernel: 'flash4' takes head_dim .*, not 80"):
        select_backend("flash4", cuda, torch.bfloat16, 80)
    monkeypatch.setattr(metadata, "version", lambda name: "4.1.0")
    choice._chosen.cache_clear()  # what other tests chose stays chosen
    with pytest.raises(
        UserError, match=r"private functions of flash-attn-4 4\.0\.0b36, and 4\.1\.0 is installed"
    ):
        select_backend("flash4", cuda, torch.float16, 128)
