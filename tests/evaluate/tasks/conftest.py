"""A tokenizer of bytes, natural text and small published files, none of which needs a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mtraining.data.tokenizer import save_byte_tokenizer
from mtraining.evaluate.tasks import SampleMaker


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def maker(tokenizer: Any) -> SampleMaker:
    return SampleMaker(tokenizer)


@pytest.fixture(scope="session")
def essays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 300 numbered sentences of eight words."""
    path = tmp_path_factory.mktemp("essays") / "text.txt"
    path.write_text(
        "\n".join(f"Sentence {n} is here to fill the page." for n in range(300)), encoding="utf-8"
    )
    return path
