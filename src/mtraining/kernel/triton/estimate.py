"""The estimation half of the Triton backend: probe scores, selection, compact columns.

Nothing here waits for the device or depends on its data for a shape, and every result repeats bit for bit: sums whose
order is free are sums of integers, all others run in a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from mtraining.kernel.triton import compact as triton_compact
from mtraining.kernel.triton import heaviest as triton_heaviest
from mtraining.kernel.triton import probe as triton_probe


class TritonEstimation:
    """Same methods as :class:`mtraining.kernel.reference.estimate.ReferenceEstimation`, fused."""

    def probe_lse(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float
    ) -> Tensor:
        probe, k = _lined_up(probe), _lined_up(k)
        return triton_probe.probe_lse(
            probe, k, probe_positions.contiguous(), key_positions.contiguous(), scale
        )

    def probe_mass(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float, lse: Tensor,
        seq_len: int, block_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        probe, k = _lined_up(probe), _lined_up(k)
        return triton_probe.probe_mass(
            probe,
            k,
            probe_positions.contiguous(),
            key_positions.contiguous(),
            scale,
            lse.contiguous(),
            seq_len,
            block_size,
        )

    def heaviest(self, mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
        return triton_heaviest.heaviest(mass.contiguous(), forced.contiguous(), top_p, keep)

    def gather_columns(self, k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
        return triton_compact.gather_columns(
            _lined_up(k), _lined_up(v), columns.contiguous(), slots.contiguous()
        )

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        triton_compact.scatter_columns(_lined_up(grads), columns.contiguous(), slots.contiguous(), dkv)


def _lined_up(x: Tensor) -> Tensor:
    """The kernels step through head_dim by one; every other stride is free."""
    return x if x.stride(-1) == 1 else x.contiguous()
