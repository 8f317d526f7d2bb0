"""Where each of torchrun's processes computes, also where this machine has fewer GPUs than processes.

What runs on a shared GPU is right or wrong as it is elsewhere, NCCL and all, but its times are not those of a GPU each.
"""

from __future__ import annotations

import os

import torch

from mtraining.ring import prioritise_transfers

_OVER_SOCKETS = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


def share_gpus() -> None:
    """Let this machine's processes share its GPUs where there are fewer, by standing on nodes of their own.

    NCCL refuses a GPU to two processes of a node, and takes ``NCCL_HOSTID`` for the node. So processes are dealt to as
    many pretended nodes as it takes, in order, one process a GPU in each; between nodes NCCL goes through sockets. The
    environment then says what a launcher on such a node would: ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``. Nothing happens
    where there are GPUs enough, or none. Call it before any process group is made.
    """
    local, processes, gpus = (
        int(os.environ["LOCAL_RANK"]),
        int(os.environ["LOCAL_WORLD_SIZE"]),
        torch.cuda.device_count(),
    )
    if not 0 < gpus < processes:
        return
    node = local // gpus
    os.environ |= {
        "LOCAL_RANK": str(local % gpus),
        "LOCAL_WORLD_SIZE": str(min(gpus, processes - node * gpus)),
        "NCCL_HOSTID": f"{os.environ.get('GROUP_RANK', '0')}-{node}",
        **_OVER_SOCKETS,
    }


def take_device(on_gpu: bool) -> torch.device:
    """The device of this process, made the current one. Call it before any process group is made."""
    if not on_gpu:
        return torch.device("cpu")
    share_gpus()
    prioritise_transfers()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def gpus_in_use(world: int) -> int:
    """Of this machine, by ``world`` processes: fewer than those where they share. On CPUs each counts for one."""
    return min(world, torch.cuda.device_count() or world)
