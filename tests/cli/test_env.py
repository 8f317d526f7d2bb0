"""`mtraining env` says what a report needs, and no secret."""

from __future__ import annotations

import json
from importlib import import_module, metadata

import pytest
import torch
from typer.testing import CliRunner

from mtraining.cli import app

# The package has the command under this name; the module is asked for by its own.
module = import_module("mtraining.cli.env")


def said(*words: str) -> str:
    result = CliRunner().invoke(app, ["env", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_versions_commit_and_kernels() -> None:
    facts = json.loads(said("--json"))
    assert list(facts) == ["mtraining", "machine", "packages", "cuda", "gpus", "links", "variables"]
    assert facts["packages"]["torch"] == metadata.version("torch")
    assert facts["packages"]["transformers"] == metadata.version("transformers")
    assert facts["mtraining"]["commit"]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    if not torch.cuda.is_available():
        assert facts["cuda"]["kernel: auto"].startswith("reference")


def test_text_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    text = said()
    assert f"  torch: {metadata.version('torch')}\n" in text
    assert "  NCCL_DEBUG: INFO\n" in text


def test_only_variables_that_matter_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("MTRAINING_TOKEN", "secret")
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    facts = json.loads(said("--json"))
    assert facts["variables"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "secret" not in json.dumps(facts)


def test_a_missing_package_and_a_missing_program_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(module, "_said_by", lambda *_: "")
    facts = module.describe()
    assert facts["packages"]["no-such-package"] == "not installed"
    assert facts["cuda"]["driver"] == "none"


def test_links_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi's table without its colours; without nvidia-smi, who reaches whose memory."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module, "_said_by", lambda *_: "\x1b[4m\tGPU0\tGPU1\x1b[0m\nGPU0\t X \tNV18\n\n")
    assert module._links() == ["\tGPU0\tGPU1", "GPU0\t X \tNV18"]
    monkeypatch.setattr(module, "_said_by", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    assert module._links() == ["0 - 1: through the host"]


def test_a_kernel_that_cannot_be_chosen_is_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no triton")

    monkeypatch.setattr("mtraining.kernel.select_backend", broken)
    assert module._cuda()["kernel: auto"] == "fails: no triton"
