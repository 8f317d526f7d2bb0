"""What a logged step says of its attention: density, recall, and how any layout would balance the same index."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.inputs.text import replace_text
from mtraining.layout import Layout, build_layout
from mtraining.ring import AttentionStats, Timeline, chosen, imbalance, tile_works
from mtraining.ring.balance import by_step
from mtraining.ring.timeline import PHASES
from mtraining.train.config import Config
from mtraining.train.mesh import Process

BALANCE = "balance.json"
RING = "ring.json"
LANES = 16  # ranks of a timeline, at most
COMPARED_LAYOUTS = ("contiguous", "zigzag", "striped")
COMPARED_WORLDS = (8, 32)  # besides the run's own number of context-parallel ranks


def attention_record(layers: Sequence[AttentionStats]) -> dict[str, Any]:
    """The attention part of a metrics record; empty when not observed.

    Density and recall are means over the layers whose pattern chose, and absent where all layers have windows. Density
    by layer is of every layer, 1.0 of one with a window, and imbalance is a mean over all layers. Recall by layer and
    by head is of every layer too.
    """
    if not layers:
        return {}
    record: dict[str, Any] = {
        "layer_density": [layer.density for layer in layers],
        "worker_imbalance": _mean([layer.balance.worker for layer in layers]),
        "step_imbalance": _mean([layer.balance.step for layer in layers]),
    }
    sparse = chosen(layers)
    if sparse:
        record["density"] = _mean([layer.density for layer in sparse])
    recalls = [layer.recall for layer in sparse if layer.recall is not None]
    if recalls:
        record["recall"] = _mean(recalls)
        record["layer_recall"] = [1.0 if layer.recall is None else layer.recall for layer in layers]
        record["recall_by_head"] = [[round(recall, 4) for recall in layer.recall_by_head] for layer in layers]
    return record


def ring_record(timeline: Timeline, process: Process) -> dict[str, Any]:
    """The ring part of a metrics record. Collective.

    ``ring_exposed_fraction``: exposed waits over all time of ring attention in the step, recompute included, mean over
    ranks, and the rank that waits most; then seconds of each ring step, computing and exposed, mean over ranks.
    """
    fractions = process.gather(timeline.exposed_fraction)
    record: dict[str, Any] = {
        "ring_exposed_fraction": _mean(fractions),
        "ring_exposed_fraction_max": max(fractions),
    }
    for phase in PHASES:
        seconds = torch.tensor(timeline.by_step(phase), dtype=torch.float64, device=process.device)
        compute, exposed = (process.sum(seconds) / process.world).tolist()
        record |= {f"ring_{phase}_compute": compute, f"ring_{phase}_exposed": exposed}
    return record


def ring_lanes(timeline: Timeline, process: Process) -> dict[str, Any]:
    """How the passes of a step went on some ranks of the first sequence, all of them up to `LANES`. Collective.

    Returns:
        ``ranks``: their places in the ring; and for ``forward`` and ``backward`` a line of ``compute`` and one of
        ``exposed`` seconds for each of them, by ring step, sums over layers and micro-batches.
    """
    seconds = torch.tensor([timeline.by_step(phase) for phase in PHASES], dtype=torch.float64)
    cp = seconds.shape[-1]
    ranks = list(range(0, cp, -(-cp // LANES)))
    lanes = torch.zeros(len(ranks), *seconds.shape, dtype=torch.float64, device=process.device)
    if process.dp_rank == 0 and process.cp_rank in ranks:
        lanes[ranks.index(process.cp_rank)] = seconds
    lines = process.sum(lanes).tolist()
    found: dict[str, Any] = {"ranks": ranks}
    for number, phase in enumerate(PHASES):
        found[phase] = {
            "compute": [line[number][0] for line in lines], "exposed": [line[number][1] for line in lines]
        }  # fmt: skip
    return found


def write_ring(folder: Path, step: int, lanes: dict[str, Any]) -> None:
    """Write `ring.json` into the run folder: :func:`ring_lanes` of this step."""
    _write(folder / RING, {"step": step, **lanes})


def write_balance(config: Config, step: int, layers: Sequence[AttentionStats]) -> None:
    """Write `balance.json` into the run folder: the index of this step under contiguous, zigzag and striped layouts.

    For the run's number of ranks and for larger rings that divide the sequence: `load` is the mean tile work of a
    layer, by rank and ring step; `worker` and `step` are imbalance degrees (max / mean), means over layers.
    """
    worlds = sorted({config.parallel.cp, *COMPARED_WORLDS})
    rings = [(world, layout) for world in worlds for layout in _layouts(config, world, layers)]
    works = tile_works([layer.index for layer in layers], [(layout, world) for world, layout in rings])
    entries = [
        _entry(layout.name, world, work, config.parallel.cp_outer if world == config.parallel.cp else 1)
        for (world, layout), work in zip(rings, works, strict=True)
    ]
    _write(config.output / BALANCE, {"step": step, "layouts": entries})


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replace a file of the last logged step."""
    try:
        replace_text(path, json.dumps(content))
    except OSError as error:
        if error.errno != errno.ENOSPC:  # a full disk is told by the metrics; the last file stays
            raise


def _layouts(config: Config, world: int, layers: Sequence[AttentionStats]) -> Iterator[Layout]:
    """Layouts that deal this sequence to a ring of ``world``; a ring that it is too short for is no choice of the run,
    so there is nothing to refuse."""
    index = layers[0].index
    for name in COMPARED_LAYOUTS:
        # Striped by one block is the paper's layout at any block size; the run's own unit may be wider.
        layout = build_layout(name, config.layout.unit if name == config.layout.name else index.block_size)
        with suppress(UserError):
            layout.check(index.seq_len, world, max(layer.index.block_size for layer in layers))
            yield layout


def _entry(name: str, world: int, works: Tensor, outer: int) -> dict[str, Any]:
    degrees = [imbalance(work, outer) for work in works]
    load = torch.stack([by_step(work, outer) for work in works]).mean(0)
    return {
        "layout": name,
        "world": world,
        "worker": _mean([degree.worker for degree in degrees]),
        "step": _mean([degree.step for degree in degrees]),
        "load": load.tolist(),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
