"""Where flash-attn-4 cannot run, it is refused with the remedy."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
import torch

from mtraining.errors import UserError
from mtraining.kernel import select_backend

pytest.importorskip("triton")


def test_refused_without_a_gpu() -> None:
    with pytest.raises(UserError, match=r"kernel: 'flash4' needs an NVIDIA GPU, not cpu; use kernel=auto"):
        select_backend("flash4", torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("capability", "version", "head_dim", "words"),
    [
        ((8, 0), "4.0.0b36", 128, "needs a Hopper GPU"),
        ((10, 0), "4.0.0b36", 128, "needs a Hopper GPU"),
        ((9, 0), None, 128, r"needs the package flash-attn-4 \(pip install flash-attn-4==4.0.0b36\)"),
        ((9, 0), "4.0.1", 128, "private functions of flash-attn-4 4.0.0b36, and 4.0.1 is installed"),
        ((9, 0), "4.0.0b36", 80, "takes head_dim .*, not 80"),
    ],
)
def test_refused_by_card_version_and_shape(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    version: str | None,
    head_dim: int,
    words: str,
) -> None:
    from mtraining.kernel.external import flash4

    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(metadata, "version", installed)
    reason = flash4.unsupported(torch.device("cuda"), torch.bfloat16, head_dim)
    assert reason is not None
    assert re.search(words, reason)


def test_accepted_on_hopper_with_the_pinned_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtraining.kernel.external import flash4

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0b36")
    assert flash4.unsupported(torch.device("cuda"), torch.bfloat16, 128) is None
