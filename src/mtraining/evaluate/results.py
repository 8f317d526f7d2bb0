"""A folder of results: one line a sample, written when the sample ends, so that a run that was killed goes on.

`run.json` says what the results are of. A folder takes more models, attentions, tasks and lengths at any time. It
refuses another seed, template or tokenizer, and another model under a name that is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtraining.errors import UserError
from mtraining.inputs.text import replace_text

RESULTS, RUN, SUMMARY = "results.jsonl", "run.json", "summary.json"


class Key(NamedTuple):
    """What a line of results is of."""

    model: str
    attention: str
    suite: str
    task: str
    length: int
    number: int


def model_fingerprint(hf_model: Any) -> str:
    """Tells models apart: by configuration, and by the first values of every parameter."""
    config = {key: value for key, value in hf_model.config.to_dict().items() if not key.startswith("_")}
    for name in ("transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in hf_model.named_parameters():
        head = parameter.detach().reshape(-1)[:64].float().cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Tells tokenizers apart: by their vocabulary and chat template."""
    content = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


@dataclass
class Results:
    """The results in one folder, open for more; only the first of many ranks writes."""

    folder: Path
    writes: bool

    def models(self) -> dict[str, str]:
        """Fingerprint of each model of which there are results, by name.

        Raises:
            UserError: what says so is damaged.
        """
        noted = self._noted()
        return {} if noted is None else noted["models"]

    def _noted(self) -> dict[str, Any] | None:
        """What the results here are of, as `begin` takes it; None where nothing was noted yet."""
        try:
            found: dict[str, Any] = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"--out {self.folder}: {RUN} is damaged; give another folder.") from None
        return found

    def begin(self, identity: dict[str, Any]) -> None:
        """Compare what is here with what is to come, and note it; the writing rank's task.

        Args:
            identity: ``settings``: what must be equal, by name; ``models``: fingerprint by name.

        Raises:
            UserError: results of something else are here.
        """
        assert self.writes
        found = self._noted()
        if found is None:
            if (self.folder / RESULTS).exists():
                raise UserError(
                    f"--out {self.folder} has {RESULTS} without {RUN}, which says what it is of; give another folder."
                )
            found = {"settings": identity["settings"], "models": {}}
        for name, value in identity["settings"].items():
            if found["settings"].get(name) != value:
                raise UserError(
                    f"--out {self.folder} holds results with {name} {found['settings'].get(name)!r}, not {value!r}; "
                    f"give another folder."
                )
        for name, fingerprint in identity["models"].items():
            if found["models"].setdefault(name, fingerprint) != fingerprint:
                raise UserError(
                    f"--out {self.folder} holds results of another model called {name}; give another folder."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / RUN, json.dumps(found, indent=1) + "\n")

    def add(self, key: Key, record: dict[str, Any]) -> None:
        """Append a line; it is on its way to the disk when this returns."""
        if self.writes:
            with open(self.folder / RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(key._asdict() | record, ensure_ascii=False) + "\n")

    def lines(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Every complete line. One cut short by a kill is passed over, and its sample is made again."""
        try:
            text = (self.folder / RESULTS).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                record = json.loads(line)
                yield Key(*(record.pop(name) for name in Key._fields)), record
            except (ValueError, KeyError):
                continue

    def mend(self) -> None:
        """End a last line that a kill cut short, so that the next one stands by itself; the writing rank's task."""
        assert self.writes
        path = self.folder / RESULTS
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n")
