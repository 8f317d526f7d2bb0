"""Kernels for Hopper GPUs, written in Gluon, the lower level of Triton 3.6.

Read :mod:`~mtraining.kernel.hopper.common` first: it has the pipeline and the table of barriers. Then
:mod:`~mtraining.kernel.hopper.items` (who works on which block, and the warp that fetches),
:mod:`~mtraining.kernel.hopper.forward`, :mod:`~mtraining.kernel.hopper.queries` (dQ) and
:mod:`~mtraining.kernel.hopper.keys` (dK and dV).
"""
