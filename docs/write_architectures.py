"""Write docs/reference/architectures.md: `python docs/write_architectures.py`, about a minute.

Every causal architecture of the installed transformers is built small, by tests/architectures.py, and asked. The page
belongs to one version of transformers, so it is written by hand when the pinned version changes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import transformers  # noqa: E402

import architectures  # noqa: E402

PAGE = HERE / "reference" / "architectures.md"
HEAD = """\
# Architectures

*This page is written by `docs/write_architectures.py`, which builds each architecture small and asks
`mtraining.model.check_supported`.*

transformers {version} knows {count} causal architectures by `AutoModelForCausalLM`. {yes} are accepted as they come,
{set} with the settings that the table names, and {no} are refused. `tests/model/test_architectures.py` compares each
accepted one with plain transformers. On a ring of two processes, loss, every gradient, and generated tokens with their
logits are those of one process. An exported folder loads with the same logits.

| verdict | architectures |
|---|---|
| accepted | {yes} |
| accepted with other settings | {set} |
| refused | {no} |

Sliding windows and chunks are computed to the token, in the layers that the config gives them to. In the comparison
they are shorter than the sequence. Where a config has layers of several kinds, every second one has full attention.

Attention sinks, factors and soft caps of logits, a bias on `lm_head`, and rotary settings by layer type are computed.
So are learned positions, layers without positions, and rotary types that depend on the length (`longrope`, `dynamic`).
The frequencies of these are fixed at the length of the whole sequence.
"""


def _settings(found: Any) -> str:
    """Settings in words."""
    words = []
    for field, value in found.items():
        if field == "layer_types":
            words.append("`layer_types` all `full_attention`")
        else:
            words.append(f"`{field}: {'null' if value is None else value}`")
    return ", ".join(words)


def _cell(reason: str) -> str:
    """A refusal without its first word, which is the same for all, on one line."""
    return reason.removeprefix("model: ").replace("|", "\\|").replace("\n", " ")


def architectures_page() -> str:
    """docs/reference/architectures.md."""
    found = {name: architectures.verdict(name) for name in sorted(architectures.NAMES)}
    kinds = [one.kind for one in found.values()]
    head = HEAD.format(
        version=transformers.__version__, count=len(found), yes=kinds.count("yes"), set=kinds.count("set"),
        no=kinds.count("no"),
    )  # fmt: skip
    rows = ["| architecture | verdict | settings, or why not |", "|---|---|---|"]
    for name, one in found.items():
        if one.kind == "no":
            rows.append(f"| `{name}` | refused | {_cell(one.reason)} |")
        else:
            rows.append(f"| `{name}` | accepted | {_settings(one.settings)} |")
    return "\n".join([head, *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(architectures_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
