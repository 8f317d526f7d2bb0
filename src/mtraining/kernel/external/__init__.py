"""Kernels of other packages (cuDNN, FlashAttention 2, flash-attn-4), and the merge that only they need."""
