"""A page in a headless Chromium: its console, its document after the charts are drawn, and pictures of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium on PATH (Debian and Ubuntu: apt-get install chromium)"
)

# What a reader does, in the order of its steps; the document then says what came of it.
VISITOR = """
<script>
window.addEventListener("error", (event) => { document.body.dataset.failed = event.message; });
const wait = setInterval(async () => {
  if (!document.body.dataset.drawn) return;
  clearInterval(wait);
  const pause = () => new Promise((done) => setTimeout(done, 300));
  %s
  document.body.dataset.visited = "yes";
}, 50);
</script>
"""


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page: its document, and complaints on its console."""

    document: str
    complaints: list[str]

    def of_body(self, name: str) -> str | None:
        """A data attribute of the body."""
        body = re.search(r"<body[^>]*>", self.document)
        found = re.search(rf'data-{name}="([^"]*)"', body.group(0)) if body else None
        return found.group(1) if found else None

    def figure(self, name: str) -> str:
        """A figure's HTML."""
        found = re.search(rf'<figure id="{name}".*?</figure>', self.document, re.DOTALL)
        assert found is not None, f"no figure {name}"
        return found.group(0)


def visit(page: Path, does: str = "", width: int = 1280, screenshot: Path | None = None) -> Visit:
    """Open a page, let a script do something once all charts are drawn, and read the document."""
    opened = page.with_name(f"visited-{width}.html")
    before, end, after = page.read_text(encoding="utf-8").rpartition("</body>")
    opened.write_text(before + VISITOR % does + end + after, encoding="utf-8")
    arguments = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=60000", f"--window-size={width},4000", "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip
    arguments.append(f"--screenshot={screenshot}" if screenshot else "--dump-dom")
    done = subprocess.run(
        [*arguments, opened.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    # Chromium itself logs of missing buses and GPUs; the page's own messages bear the word CONSOLE.
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(done.stdout, complaints)
