"""Estimation kernels in Triton: probe scores, and the heaviest entries.

Nothing here waits for the device or depends on its data for a shape. Every result repeats bit for bit: sums whose
order is free are sums of integers, all others run in a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from mtraining.kernel.backend import ProbeScope
from mtraining.kernel.triton import heaviest as triton_heaviest
from mtraining.kernel.triton import probe as triton_probe


class TritonEstimation:
    """Implements :class:`mtraining.kernel.backend.EstimationKernels`."""

    def probe_lse(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float,
        scope: ProbeScope | None = None,
    ) -> Tensor:  # fmt: skip
        probe, k = unit_head_dim(probe), unit_head_dim(k)
        return triton_probe.probe_lse(
            probe, k, probe_positions.contiguous(), key_positions.contiguous(), scale, scope
        )

    def probe_mass(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float, lse: Tensor,
        seq_len: int, block_size: int, scope: ProbeScope | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        probe, k = unit_head_dim(probe), unit_head_dim(k)
        at, key_at = probe_positions.contiguous(), key_positions.contiguous()
        return triton_probe.probe_mass(
            probe, k, at, key_at, scale, lse.contiguous(), seq_len, block_size, scope
        )

    def heaviest(self, mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
        return triton_heaviest.heaviest(mass.contiguous(), forced.contiguous(), top_p, keep)


def unit_head_dim(x: Tensor) -> Tensor:
    """``x`` with unit stride along head_dim, which the kernels need; every other stride is free."""
    return x if x.stride(-1) == 1 else x.contiguous()
