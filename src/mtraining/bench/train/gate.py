"""The gate before a training step is timed: its loss and gradients equal those of one process that holds all tokens.

A small model (two layers, the real heads, a short sequence) runs under the very settings that are to be timed. It is
compared with the eager reference kernel in fp32, without recompute, fusion, ring or sharding.

A step with float8 is checked in three parts, since roundings to float8 hide smaller faults: the same step without
float8, float8's products by themselves (`mtraining.bench.train.products`), and the step as it is beside float8
emulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtraining.bench.attention.gate import GateError
from mtraining.bench.train.cases import TrainCase
from mtraining.bench.train.model import batches, build_model, compute_dtype, parallel, random_sequences
from mtraining.bench.train.products import check_products
from mtraining.model import ParallelLM, parallelize
from mtraining.model.float8 import float8_layers
from mtraining.model.float8_checks import emulation_of, recipe_of
from mtraining.train.mesh import Process
from mtraining.train.step import Batch

LAYERS = 2
LOSS_TOLERANCE = {torch.bfloat16: 1e-3, torch.float32: 1e-5}
GRADIENT_TOLERANCE = {torch.bfloat16: 8e-2, torch.float32: 1e-4}
# Of a whole step in float8 beside its emulation, which rounds activations in fp32 to float8. Where the step rounds them
# to bf16 before, some fall on the other side of a rounding to float8, and errors grow from product to product. At the
# shapes of the benchmark 0.27 was measured: with float8 on an H100, and with its emulation in bf16 on a CPU, for two
# layers and for four. So this shows no more than a gradient that is missing, doubled or turned; smaller faults are the
# other two parts'. In fp32, 2^16 times fewer fall on the other side, and errors are smaller by the root of that.
FLOAT8_GRADIENT_TOLERANCE = {torch.bfloat16: 0.4, torch.float32: 2e-3}
VOCABULARY = 512


def shortened(case: TrainCase, world: int) -> TrainCase:
    """The case on a short sequence, two layers, with an index that is thin enough to have gaps.

    Where layers keep different things there is a layer of each kind. Cases that shorten to the same are checked once.
    """
    size = case.shape.block_size
    blocks = 2 * world * max(2, -(-8 // world))  # a multiple of what zigzag deals
    shape = replace(case.shape, columns=size, window=2)
    density = None if case.density is None else 0.4
    kinds = None if case.policies is None else tuple(dict.fromkeys(case.policies))
    if kinds is not None:
        kinds += kinds[-1:] * (LAYERS - len(kinds))
    layers = LAYERS if kinds is None else len(kinds)
    return replace(case, shape=shape, seq_len=blocks * size, layers=layers, density=density, policies=kinds)


def gate_model(case: TrainCase, device: torch.device) -> Any:
    """Weights that make attention neither uniform, its gradients rounded away, nor so sharp that rounding decides."""
    spread = 1.2 * case.shape.hidden**-0.5
    fields = {"vocab_size": VOCABULARY, "intermediate_size": 256, "initializer_range": spread}
    return build_model(case.shape, case.seq_len, case.layers, device, **fields)


def check_step(
    case: TrainCase, process: Process, dp: int = 1, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Collective over the ranks of the case's ring, of all ``dp`` rings where there are several.

    Args:
        dtype: to compute in; None is that of the device (`compute_dtype`).

    Returns:
        The loss, and the norm of the gradient, of the one process.

    Raises:
        GateError: naming the loss, the parameter or the product at fault, and its error; on all ranks alike.
    """
    dtype = compute_dtype(process.device) if dtype is None else dtype
    small = shortened(case, process.world)
    if case.float8 == "off":
        return _check_whole(small, process, dp, dtype)
    try:
        _check_whole(replace(small, float8="off"), process, dp, dtype)
    except GateError as wrong:
        raise GateError(f"with float8 off, {wrong}") from wrong
    _check_float8_products(small, process, dtype)
    return _check_whole(small, process, dp, dtype)


def _check_float8_products(small: TrainCase, process: Process, dtype: torch.dtype) -> None:
    """Each rank computes the same, for itself; an error of one is raised on all."""
    tested, emulated = (gate_model(small, process.device).to(dtype) for _ in range(2))
    wrong = ""
    try:
        check_products(tested, emulated, small.float8, process.device)
    except GateError as error:
        wrong = str(error)
    if found := next(filter(None, process.gather_objects(wrong)), ""):
        raise GateError(found)


def _check_whole(small: TrainCase, process: Process, dp: int, dtype: torch.dtype) -> tuple[float, float]:
    """A shortened case, whole; see `check_step`."""
    sequences = random_sequences(VOCABULARY, small.seq_len, dp)
    reference = parallelize(
        gate_model(small, process.device),
        # The same roundings to float8: beside products in fp32 they would hide smaller faults.
        float8=emulation_of(small.float8),
        pattern=small.pattern(estimate=False),
        layout="contiguous",
        kernel="reference",
        recompute="none",
    )
    alone = Process(process.device, process.mesh, 0, 1, 0, 0)
    labels = dp * small.seq_len
    # One by one, as each ring has its own: a prescribed index may differ from row to row of a batch.
    rows = [next(batches(small, row, alone)) for row in sequences.split(1)]
    loss, truth = _loss_and_gradients(reference, rows, labels)
    tested = parallel(small, gate_model(small, process.device), process, dtype)
    # A step that leaves layers in bf16 is nearer to the truth than one in float8, so no number shows it.
    if small.float8 != "off" and float8_layers(tested).keys() != float8_layers(reference).keys():
        raise GateError("other layers are in float8 than in the reference")
    share, gradients = _loss_and_gradients(tested, [next(batches(small, sequences, process, dp))], labels)
    true_loss = float(loss)
    allowed = (GRADIENT_TOLERANCE if small.float8 == "off" else FLOAT8_GRADIENT_TOLERANCE)[dtype]
    # Each rank has scales of its own, and rounds otherwise than the one process.
    if recipe_of(small.float8) == "tensorwise":
        allowed = FLOAT8_GRADIENT_TOLERANCE[torch.bfloat16]
    compare(float(process.sum(share)), gradients, true_loss, truth, LOSS_TOLERANCE[dtype], allowed)
    return true_loss, float(torch.stack([x.norm() for x in truth.values()]).norm())


def _loss_and_gradients(
    model: ParallelLM, pieces: Sequence[Batch], labels: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share of the loss (fp64), and whole gradients by name, of these batches together."""
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with model.training_step(1):
        for piece in pieces:
            ids, positions, wanted = (
                piece[name].to(device) for name in ("input_ids", "position_ids", "labels")
            )
            share = model(ids, positions, wanted, labels)
            share.backward()
            loss += share.detach()
    gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients


def _whole(gradient: Any) -> Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).float()


def compare(
    loss: float,
    gradients: dict[str, Tensor],
    true_loss: float,
    truth: dict[str, Tensor],
    loss_tolerance: float,
    gradient_tolerance: float,
) -> None:
    """Raise :class:`GateError` unless both agree within these relative tolerances; NaN never does."""
    if not abs(loss - true_loss) <= loss_tolerance * abs(true_loss):
        raise GateError(f"loss {loss:.6f}, of one process {true_loss:.6f}")
    if gradients.keys() != truth.keys():
        raise GateError(f"gradients of {sorted(gradients.keys() ^ truth.keys())[0]} on one side only")
    names = list(truth)
    sizes = torch.stack([truth[name].norm() for name in names])
    errors = torch.stack([(gradients[name] - truth[name]).norm() for name in names])
    # A gradient that is nothing beside the others (a key's bias under softmax) is rounding error on both sides.
    relative = errors / sizes.clamp(min=0.01 * float(sizes.max()))
    worst = int(relative.nan_to_num(torch.inf).argmax())
    if not float(relative[worst]) <= gradient_tolerance:
        raise GateError(
            f"gradient of {names[worst]}: relative error {float(relative[worst]):.1e}, at most "
            f"{gradient_tolerance:.0e} is allowed"
        )
