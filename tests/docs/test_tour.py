"""docs/tour.md tells the truth: its configuration and its commands run as they stand there, one after the other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from docs_pages import ROOT, command_lines
from mtraining.cli import app
from mtraining.pattern import load_table

TOUR = (ROOT / "docs" / "tour.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```$", TOUR, flags=re.MULTILINE | re.DOTALL)
    for line in command_lines(block)
]
CONFIGURATION = re.findall(r"^```yaml\n(.*?)^```$", TOUR, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_from_text_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(CONFIGURATION[0])
    said = {}
    for program, *arguments in COMMANDS:
        assert program == "mtraining"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        said[arguments[0]] = said.get(arguments[0], "") + result.output
    assert list(said) == ["prepare", "train", "report", "export", "calibrate"]
    assert "fits into 16.0 GiB" in said["train"]
    steps = [json.loads(line) for line in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert 0 < steps[-1]["recall"] < 1 and steps[-1]["density"] < 0.5
    assert Path("runs/first/report/report.html").is_file()
    assert AutoModelForCausalLM.from_pretrained("exported").config.max_position_embeddings == 2048
    assert len(load_table(Path("patterns.yaml"), "vertical_slash", block_size=32)) == 2
