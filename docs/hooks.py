"""What mkdocs is told while it builds the site.

Docstrings name other objects in two ways: by a role, such as :func:`name`, and in plain backticks. The reference shows
both as code.
"""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Drop the role in front of a name."""
    return ROLE.sub("", html)
