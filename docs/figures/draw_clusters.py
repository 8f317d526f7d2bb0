"""Draw the figures of scaling.md: `python docs/figures/draw_clusters.py` writes them beside this file.

cluster-scaling.svg, cluster-binding.svg and cluster-timelines.svg: rings of up to 1,024 ranks, simulated in half a
minute. Run it when the ring's schedule or the rates of the H200 change.
"""

from __future__ import annotations

import sys
from pathlib import Path

from draw import HERE, draw

from mtraining.report.ring_scaling import binding_figure, scaling_figure, timelines_figure

RANKS = (8, 16, 32, 64, 128, 256, 1024)
FIGURES = {
    "cluster-scaling": lambda: scaling_figure(RANKS),
    "cluster-binding": lambda: binding_figure(RANKS),
    "cluster-timelines": timelines_figure,
}

if __name__ == "__main__":
    for drawn in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, FIGURES):
        print(f"wrote {drawn}")
