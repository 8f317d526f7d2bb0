"""FSDP2's reduction of gradients, with its results in the memory that activations leave free.

FSDP2 reduces on a stream of its own, and allocates there. PyTorch's allocator keeps freed memory for the stream that
took it. So the shards of all gradients would come from memory that no activation ever uses, although backward frees
activations as gradients come. Qwen2.5-3B on two GPUs has 5.8 GiB of such shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


class ReduceIntoFreed(DefaultReduceScatter):
    """What `FSDPModule.set_custom_reduce_scatter` takes: reduces as FSDP2 does, and allocates on the default stream."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """An empty tensor for use on the current stream, in memory of the default stream."""
        if device.type != "cuda":
            return super().allocate(size, dtype=dtype, device=device)
        current, home = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
        # The memory may have been freed while kernels that use it still wait to run there.
        current.wait_stream(home)
        with torch.cuda.stream(home):
            tensor = super().allocate(size, dtype=dtype, device=device)
        # Freed, it waits for the current stream's work before it serves the default stream again.
        tensor.record_stream(current)
        return tensor
