"""Start a benchmark's processes, and say where each computes, also where there are fewer GPUs than processes.

What runs on a shared GPU is right or wrong as it is elsewhere, NCCL and all, but its times are not those of a GPU each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from mtraining.bench.record import COMMIT_VARIABLE, code_version
from mtraining.data.loader import end_with_parent
from mtraining.errors import UserError
from mtraining.ring import prioritise_transfers
from mtraining.train.leaving import exit_now

_OVER_SOCKETS = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


# torchrun, but for its end: it does not outlive a benchmark that was killed.
_TORCHRUN = (
    "from mtraining.data.loader import end_with_parent; from torch.distributed.run import main; "
    "end_with_parent(); main()"
)


def on_gpu(device: str) -> bool:
    """Whether the option ``device`` means a GPU: "" stands for one where there is one.

    Raises:
        UserError: it is not known.
    """
    if device not in ("", "cuda", "cpu"):
        raise UserError(f"device: {device!r} is not known; use cuda or cpu.")
    return (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"


def process_count(nproc: int | None, gpu: bool) -> int:
    """How many processes the option ``nproc`` means: by default one a GPU, or two on a CPU.

    Raises:
        UserError: more than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    wanted = nproc or (gpus if gpu else 2)
    if gpu and not 1 <= wanted <= gpus:
        raise UserError(f"nproc: {wanted} processes want a GPU each and there are {gpus}; use device cpu.")
    return wanted


def under_torchrun() -> bool:
    """Whether this is one of the processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    A process of torchrun skips the interpreter's own end. There a thread of gloo or NCCL may abort the process, and a
    benchmark whose results are written would count as failed.
    """
    if under_torchrun():
        exit_now(code)
    sys.exit(code)


def start(module: str, words: Sequence[str], processes: int, gpu: bool, restarts: int = 0) -> int:
    """Run ``python -m module words`` as so many processes, by torchrun; returns its exit status.

    torchrun ends with this process, and they with torchrun where they call `take_device`, also when it is killed:
    processes that are left over hold GPU memory and slow what is measured next.

    Args:
        restarts: how often all processes are started again when one of them fails.
    """
    launcher = [
        "-c", _TORCHRUN, "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}",
        "--monitor-interval=0.2",
    ]  # fmt: skip
    environment = os.environ | {COMMIT_VARIABLE: code_version()}
    if not gpu:
        environment.setdefault("OMP_NUM_THREADS", "1")
    # torchrun would take --nproc for a short form of options of its own, and these processes need not know.
    words = [word for word in words if not word.startswith("--nproc=")]
    command = [sys.executable, *launcher, "-m", module, *words]
    return subprocess.run(command, env=environment, check=False).returncode


def share_gpus() -> None:
    """Let this machine's processes share its GPUs where there are fewer, by standing on nodes of their own.

    NCCL refuses a GPU to two processes of a node, and takes ``NCCL_HOSTID`` for the node. So processes are assigned in
    order to as many pretended nodes as it takes, one process a GPU in each. Between nodes NCCL goes through sockets.
    The environment then says what a launcher on such a node would: ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``. Nothing
    happens where there are GPUs enough, or none. Call it before any process group is made.
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
    """The device of this process, made the current one. Call it before any process group is made.

    A process of torchrun is killed from here on when torchrun ends.
    """
    if under_torchrun():
        end_with_parent()
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
