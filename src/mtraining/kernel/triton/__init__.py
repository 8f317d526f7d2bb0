"""Portable Triton kernels for NVIDIA GPUs, and for CPUs in the interpreter."""
