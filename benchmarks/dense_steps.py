"""Full attention in a zigzag ring: the three kinds of step of one rank, by every kernel, without the transfers.

python benchmarks/dense_steps.py [SEQ_LEN [RANKS [OUT.csv]]]      (an NVIDIA GPU; 524288 tokens over 4 ranks by default)

A step is either the rank's own keys (causal), keys of a rank before it (all queries, the first half of the keys) or of
a rank after it (the second half of the queries, all keys): the same operations each. 16 query and 2 kv heads of 128,
bf16; a merge with the previous step's result is part of the forward. ``layer`` is one rank's work for one layer.
"""

from __future__ import annotations

import csv
import math
import sys
from datetime import date
from pathlib import Path

import torch

from mtraining.bench.record import code_version
from mtraining.bench.timing import measure
from mtraining.errors import UserError
from mtraining.kernel import Placement, dense_index, select_backend
from mtraining.kernel.placement import causal_pieces
from mtraining.layout import build_layout

BLOCK, HEADS, KV_HEADS, DIM = 128, 16, 2, 128
COLUMNS = (
    "date", "commit", "gpu", "torch", "seq_len", "ranks", "kernel", "step", "forward_ms", "backward_ms",
    "forward_tflops", "backward_tflops",
)  # fmt: skip


def main(seq_len: int = 524288, ranks: int = 4, path: Path | None = None) -> int:
    device, dtype = torch.device("cuda"), torch.bfloat16
    if ranks < 3:
        raise SystemExit("RANKS: a rank with others before and after it takes at least 3; the default is 4.")
    blocks = build_layout("zigzag").blocks(seq_len, ranks, BLOCK)
    rank, local, scale = 1, seq_len // ranks, DIM**-0.5
    index = dense_index(1, HEADS, seq_len, BLOCK, device)
    q, dout = (torch.randn(1, local, HEADS, DIM, dtype=dtype, device=device) for _ in range(2))
    k, v = (torch.randn(1, local, KV_HEADS, DIM, dtype=dtype, device=device) for _ in range(2))
    flops = 4 * DIM * HEADS * local * local / 2
    rows: list[dict[str, object]] = []
    for kernel in ("flash4", "cudnn", "flash", "triton"):
        try:
            backend = select_backend(kernel, device, dtype, DIM)
        except UserError as lacking:
            print(lacking)
            continue
        layer = [0.0, 0.0]
        for step, source, times in (("own", rank, 1), ("before", 0, rank), ("after", 2, ranks - 1 - rank)):
            place = Placement(
                blocks[rank].to(device), blocks[source].to(device), seq_len // BLOCK,
                pieces=causal_pieces(blocks[rank], blocks[source]),
            )  # fmt: skip
            out = torch.zeros(q.shape, device=device)
            lse = torch.zeros(1, HEADS, local, device=device)
            delta, dq = torch.zeros_like(lse), torch.zeros_like(out)
            whole = torch.full_like(lse, math.log(seq_len) + 0.5)  # of normal scores: as large as in training

            def forward(place: Placement = place, out: torch.Tensor = out, lse: torch.Tensor = lse) -> object:
                return backend.tiles_forward(q, k, v, index, place, scale, out, lse)  # noqa: B023

            def backward(
                place: Placement = place, lse: torch.Tensor = whole, delta: torch.Tensor = delta,
                dq: torch.Tensor = dq,
            ) -> object:  # fmt: skip
                _, rest = backend.tiles_backward(dout, q, k, v, lse, delta, index, place, scale)  # noqa: B023
                return rest(dq)

            spent = [measure(run, device).ms for run in (forward, backward)]
            layer = [total + times * ms for total, ms in zip(layer, spent, strict=True)]
            rows.append(_row(seq_len, ranks, kernel, step, spent, flops))
        rows.append(_row(seq_len, ranks, kernel, "layer", layer, flops * ranks))
    if path is not None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


def _row(
    seq_len: int, ranks: int, kernel: str, step: str, spent: list[float], flops: float
) -> dict[str, object]:
    rates = [times * flops / ms / 1e9 for times, ms in zip((1.0, 2.5), spent, strict=True)]
    print(
        f"{kernel:7s} {step:7s} forward {spent[0]:8.1f} ms {rates[0]:5.0f} TFLOP/s, "
        f"backward {spent[1]:8.1f} ms {rates[1]:5.0f} TFLOP/s"
    )
    values = (
        date.today().isoformat(), code_version(), torch.cuda.get_device_name(), torch.__version__, seq_len, ranks,
        kernel, step, *(round(x, 2) for x in (*spent, *rates)),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(*map(int, given[:2]), *map(Path, given[2:3])))
