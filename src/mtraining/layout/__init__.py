"""Who holds which tokens: pure integer maps between global positions and context-parallel ranks."""

from mtraining.layout.maps import LAYOUTS, Contiguous, Layout, Striped, Zigzag, build_layout

__all__ = ["LAYOUTS", "Contiguous", "Layout", "Striped", "Zigzag", "build_layout"]
