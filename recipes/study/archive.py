"""What travels: the tables of a study and what they were made on, without corpus and weights.

STUDY/about/TIME.json     commit and hardware of one call of `run`
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from mtraining.bench.record import code_version
from mtraining.errors import UserError, first_line

LEFT = ("corpus", "checkpoints", "best")  # folders and links that stay behind


def note(study: Path) -> None:
    """Write down the commit and hardware of this call."""
    folder = study / "about"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"commit": code_version(), "hardware": hardware()}
    (folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json").write_text(json.dumps(about))


def noted(study: Path, name: str) -> str:
    """Every commit, or all hardware, that a study was run with, in the order of the calls; "unknown" for none."""
    found = [json.loads(path.read_text())[name] for path in sorted((study / "about").glob("*.json"))]
    return ", ".join(dict.fromkeys(found)) or "unknown"


def hardware() -> str:
    """Names of the GPUs, such as 2 x NVIDIA H100 80GB HBM3; or how many CPU cores there are."""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and names:
            return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{os.cpu_count()} CPU cores"


def pack(study: Path, path: Path) -> int:
    """Write everything of a study that travels into an archive; the old one stays until the new one is whole.

    Returns:
        its bytes.
    """

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if set(Path(member.name).parts) & set(LEFT) else member

    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    with tarfile.open(fresh, "w:gz") as archive:
        archive.add(study, ".", filter=kept)
    os.replace(fresh, path)
    return path.stat().st_size


def unpack(archives: Sequence[Path], study: Path) -> None:
    """Join archives into one folder; of a file that several hold, the last one's stays.

    Raises:
        UserError: a file that is no archive.
    """
    study.mkdir(parents=True, exist_ok=True)
    for path in archives:
        try:
            with tarfile.open(path) as archive:
                archive.extractall(study, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(
                f"{path} cannot be unpacked ({first_line(error)}); give archives that `run --results` wrote."
            ) from None
