from pathlib import Path

import pytest

from mtraining.inputs.text import replace_text


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    replace_text(path, "old")

    def met_half(self: Path, text: str, encoding: str) -> int:
        with open(self, "w", encoding=encoding) as file:
            file.write(text[:1])
        assert path.read_text() == "old"  # what another rank reads meanwhile
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", met_half)
    with pytest.raises(OSError, match="full"):
        replace_text(path, "new")
    assert [path] == list(tmp_path.iterdir()) and path.read_text() == "old"
    monkeypatch.undo()
    replace_text(path, "new")
    assert [path] == list(tmp_path.iterdir()) and path.read_text() == "new"
