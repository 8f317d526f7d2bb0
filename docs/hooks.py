"""What mkdocs does beside its plugins while it builds the site."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")
LIST = re.compile(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", re.MULTILINE)
COMMANDS = re.compile(r"<!-- commands:.*?-->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what typer says of every command where a page asks for it."""
    return COMMANDS.sub(lambda _: commands(), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name objects by the roles of Sphinx; show the name alone."""
    return ROLE.sub("", html)


def commands() -> str:
    """Every command with its arguments and options, as Markdown, from typer's own command."""
    words = [sys.executable, "-m", "typer", "mtraining.cli", "utils", "docs", "--name", "mtraining"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"typer could not describe the commands: {done.stderr}")
    # The page has a title of its own; lists of commands are cut short there, and each command follows anyway.
    return LIST.sub("", done.stdout.partition("\n")[2])
