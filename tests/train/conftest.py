"""Data shared by the tests of training."""

from pathlib import Path

import pytest
from tiny_run import make_data, make_unseen


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards for tiny runs."""
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out token shards for tiny runs."""
    return make_unseen(tmp_path_factory.mktemp("unseen"))
