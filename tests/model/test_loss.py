"""The chunked linear cross entropy against torch's own on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from library_warnings import SCRIPT_METHODS
from mtraining.errors import UserError
from mtraining.model import loss as loss_module
from mtraining.model.logits import Head, LogitForm
from mtraining.model.loss import chunked_cross_entropy, chunked_token_losses, chunked_token_scores

TOKENS, VOCAB, HIDDEN = 37, 23, 8


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, (1, TOKENS))
    labels[0, 3:9] = -100
    labels[0, 20] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    hidden, weight, labels = inputs()
    plain = cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum") / 19
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, labels, 19, chunk)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), expected, rtol=1e-11, atol=1e-14)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Each shape and form is a compilation of its own, and one function has a limited number."""
    torch._dynamo.reset()


FORMS = [LogitForm(0.0625), LogitForm(cap=1.5), LogitForm(3.0, 2.0), LogitForm(-1.5, 4.0)]


@pytest.mark.filterwarnings(SCRIPT_METHODS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_factor_cap_and_bias(form: LogitForm, compiled: bool) -> None:
    """Against autograd through whole logits, with gradients in all three of their inputs."""
    hidden, weight, labels = inputs()
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    logits = (hidden @ weight.T + bias) * form.scale
    if form.cap is not None:
        logits = form.cap * torch.tanh(logits / form.cap)
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected = torch.autograd.grad(losses.sum() / 19, (hidden, weight, bias))
    loss = chunked_cross_entropy(hidden, weight, labels, 19, 16, compiled, bias=bias, form=form)
    torch.testing.assert_close(loss, losses.sum() / 19, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert min(gradient.abs().max() for gradient in found) > 1e-3
    head = Head(weight, bias, form)
    torch.testing.assert_close(
        chunked_token_losses(hidden, head, labels, 7)[0], losses, rtol=1e-12, atol=1e-14
    )
    greedy = chunked_token_scores(hidden, head, labels, 7)[1]
    assert torch.equal(greedy > 0, logits.argmax(-1) == labels)


def test_only_what_is_trained_has_a_gradient() -> None:
    """A head's bias alone, as a recipe that freezes the rest."""
    hidden, weight, labels = (x.detach() for x in inputs())
    bias = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, labels, 19, 16, bias=bias)
    plain = cross_entropy((hidden @ weight.T + bias)[0], labels[0], reduction="sum") / 19
    (found,), (expected,) = (torch.autograd.grad(x, (bias,)) for x in (loss, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings(SCRIPT_METHODS)
def test_compiled_equals_eager() -> None:
    """The last of its chunks is a short one."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        hidden, weight, labels = inputs()
        loss = chunked_cross_entropy(hidden, weight, labels, 19, 16, compiled)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings(SCRIPT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_compiled_equals_eager_over_many_words(dtype: torch.dtype) -> None:
    """So many that a compiler's loops have several turns: where one reads what another overwrote, losses are wrong."""
    hidden = torch.randn(64, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(1000, (64,))
    labels[::7] = -100
    results = []
    for compiled in (False, True):
        loss = chunked_cross_entropy(hidden, weight, labels, 54, 64, compiled)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for eager, fused in zip(*results, strict=True):
        assert (fused - eager).norm() <= (1e-12 if dtype == torch.float64 else 1e-5) * eager.norm()


def test_gradcheck() -> None:
    hidden, weight, labels = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: 3 * chunked_cross_entropy(h, w, labels, 30, 7), (hidden, weight)
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_gets_no_gradient(frozen: int) -> None:
    hidden, weight, labels = inputs()
    (hidden, weight)[frozen].requires_grad_(False)
    chunked_cross_entropy(hidden, weight, labels, 30, 7).backward()
    assert ((hidden.grad is None), (weight.grad is None)) == (frozen == 0, frozen == 1)


def test_all_ignored_gives_zero_and_ignored_nan_rows_do_not_leak() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[0, 4] = float("nan")
    loss = chunked_cross_entropy(hidden, weight, labels, torch.tensor(30), 7)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None and not hidden.grad[0, labels[0] == -100].any()
    nothing = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), 1, 7)
    assert nothing.item() == 0


def test_low_precision_inputs_accumulate_in_fp32() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, labels, 30, 4)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    plain = cross_entropy((wide_hidden @ wide_weight.T).flatten(0, 1), labels.flatten(), reduction="sum") / 30
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=5e-3)
    for got, expected in ((hidden.grad, wide_hidden.grad), (weight.grad, wide_weight.grad)):
        assert got is not None and expected is not None
        assert float((got - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("label", [-1, -101, VOCAB, 10**9])
def test_a_label_outside_of_the_vocabulary_is_refused(label: int) -> None:
    hidden, weight, labels = inputs()
    labels[0, 30] = label
    sentence = (
        rf"labels: 1 of them \(such as {label}\) are neither -100, .* among the model's 23 words, 0 to 22;"
    )
    for call in (lambda: chunked_cross_entropy(hidden, weight, labels, 30, 7),
                 lambda: chunked_token_losses(hidden, Head(weight), labels, 7)):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            call()


@pytest.mark.filterwarnings(SCRIPT_METHODS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("label", [-1, -101, VOCAB])
def test_where_labels_cannot_be_looked_at_such_a_label_makes_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch, label: int, compiled: bool
) -> None:
    """As on a GPU, where a look would wait for the device."""
    monkeypatch.setattr(loss_module, "on_host", lambda labels: False)
    hidden, weight, labels = inputs()
    labels[0, 30] = label
    loss = chunked_cross_entropy(hidden, weight, labels, 30, 16, compiled)
    loss.backward()
    assert loss.isnan() and hidden.grad is not None and weight.grad is not None
    assert hidden.grad[0, 30].isnan().all() and weight.grad.isnan().any()
    losses = chunked_token_losses(hidden, Head(weight), labels, 7)
    assert losses.isnan().nonzero().tolist() == [[0, 30]]


def test_the_words_at_the_ends_of_the_vocabulary_are_labels() -> None:
    hidden, weight, labels = inputs()
    labels[0, 29:31] = torch.tensor([0, VOCAB - 1])
    plain = cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum") / 30
    torch.testing.assert_close(
        chunked_cross_entropy(hidden, weight, labels, 30, 7), plain, rtol=1e-12, atol=0
    )


def test_token_losses() -> None:
    hidden, weight, labels = inputs()
    expected = cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none")
    losses = chunked_token_losses(hidden, Head(weight), labels, 6)
    assert losses.shape == labels.shape and not losses.requires_grad
    torch.testing.assert_close(losses.flatten(), expected.detach())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_whole_logits_never_exist() -> None:
    tokens, vocab, hidden_size, chunk = 512, 1024, 4, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    with LargestTensor() as plain:
        cross_entropy(hidden @ weight.T, labels).backward()
    assert plain.numel >= tokens * vocab  # the measure sees what it should
    with LargestTensor() as ours:
        chunked_cross_entropy(hidden, weight, labels, tokens, chunk).backward()
    assert ours.numel <= chunk * vocab


def test_scores_refuse_labels_outside_of_the_vocabulary() -> None:
    hidden, weight = torch.randn(1, 3, 4), torch.randn(7, 4)
    for wrong in (-1, 7):
        with pytest.raises(UserError, match="labels"):
            chunked_token_scores(hidden, Head(weight), torch.tensor([[0, wrong, -100]]))
