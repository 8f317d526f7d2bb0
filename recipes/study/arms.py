"""A plan: the arms of a study, and the configuration of each one's runs.

A plan is a YAML file (extend.yaml, learn.yaml). `config` is what all runs share. An arm changes some of it: `pattern`
and `layout` as a whole, other sections key by key. `smoke` and `small` shrink all of it to sizes for CPUs. `like` names
another plan, whose sections the plan has, but for its arms and what it says itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mtraining.errors import UserError, did_you_mean
from mtraining.inputs.yaml_text import read_yaml, write_yaml
from mtraining.pattern import PATTERNS

FOLDER = Path(__file__).parent
_KEYS = ("corpus", "config", "arms", "measure", "smoke", "small", "like")
_SHARED = ("corpus", "config", "measure")  # sections of all arms
_WHOLE = ("pattern", "layout")  # sections that an arm replaces as a whole
_SAVED = "plan.yaml"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        about: one line for a reader.
        seeds: one run each; the first one is run before any other arm's second.
        changes: of the shared configuration.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a study does.

    Attributes:
        name: of its file.
        corpus: what `corpus.make` takes.
        config: sections that all runs share.
        measure: what `measure.measure` takes.
        order: names and seeds of the runs; empty for the first seed of every arm, then the second ones.
    """

    name: str
    corpus: Mapping[str, Any]
    config: Mapping[str, Any]
    arms: tuple[Arm, ...]
    measure: Mapping[str, Any]
    order: tuple[tuple[str, int], ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of this name; `UserError` where there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        names = [arm.name for arm in self.arms]
        raise UserError(
            f"--arms: {name!r} is not an arm of {self.name}{did_you_mean(name, names)}; choose of {', '.join(names)}."
        )

    def save(self, study: Path) -> None:
        """Keep the plan in a study's folder, for :func:`saved_plan`."""
        study.mkdir(parents=True, exist_ok=True)
        (study / _SAVED).write_text(write_yaml(asdict(self)), encoding="utf-8")

    def chosen(self, names: Sequence[str], seeds: int | None = None) -> Plan:
        """The same with some runs alone: of these arms (none given: all), and at most ``seeds`` seeds of each.

        Args:
            names: arms, whose second seeds come after every first one; or runs such as dense:1, in their order.

        Raises:
            UserError: no such arm or seed.
        """
        named = [name.partition(":") for name in names]
        if not any(colon for _, colon, _ in named):
            arms = [self.arm(name) for name in names] or list(self.arms)
            return replace(self, arms=tuple(replace(arm, seeds=arm.seeds[:seeds]) for arm in arms))
        if seeds is not None:
            raise UserError("--seeds has no effect on runs that --arms names one by one; leave it out.")
        order = []
        for name, _, seed in named:
            if not seed.isdecimal():
                raise UserError(
                    f"--arms: {name} stands beside runs of one seed; write {name}:0 for its first."
                )
            order.append((self.arm(name).name, int(seed)))
        arms = [
            replace(self.arm(name), seeds=tuple(seed for other, seed in order if other == name))
            for name in dict.fromkeys(name for name, _ in order)
        ]
        return replace(self, arms=tuple(arms), order=tuple(order))

    def runs(self) -> list[tuple[Arm, int]]:
        """Every run. Second seeds come when every arm has its first, where no order is given."""
        if self.order:
            return [(self.arm(name), seed) for name, seed in self.order]
        turns = max(len(arm.seeds) for arm in self.arms)
        return [(arm, arm.seeds[turn]) for turn in range(turns) for arm in self.arms if turn < len(arm.seeds)]

    def check(self, study: Path) -> None:
        """Build every arm's model without its weights, and what one step of it computes.

        Raises:
            UserError: an arm that `mtraining train` would refuse only when its turn comes.
        """
        from mtraining.train.config import parse_config
        from mtraining.train.memory_report import workload

        for arm, seed in {arm.name: (arm, seed) for arm, seed in self.runs()}.values():
            try:
                workload(parse_config(self.run_config(arm, seed, study)))
            except UserError as error:
                raise UserError(f"plan {self.name}, arm {arm.name}: {error}") from error

    def run_config(self, arm: Arm, seed: int, study: Path) -> dict[str, Any]:
        """The configuration of one run, as `mtraining train` reads it."""
        config = merged(self.config, arm.changes)
        config["output"] = str(run_folder(study, arm.name, seed))
        config["data"] = {**config.get("data", {}), "path": str(study / "corpus" / "tokens")}
        config["train"] = {**config["train"], "seed": seed}
        # Weights that are drawn differ by seed too.
        config["model"] = {**config["model"], "seed": seed}
        if config.get("evaluate"):
            config["evaluate"] = {**config["evaluate"], "data": str(study / "corpus" / "held-out")}
        return config


def saved_plan(study: Path) -> Plan | None:
    """The plan that a study was last run with; None where it was not."""
    path = study / _SAVED
    if not path.exists():
        return None
    raw = read_yaml(path.read_text(encoding="utf-8"), f"plan {path}")
    arms = tuple(Arm(**arm | {"seeds": tuple(arm["seeds"])}) for arm in raw.pop("arms"))
    return Plan(arms=arms, **raw | {"order": tuple(map(tuple, raw["order"]))})


def run_folder(study: Path, arm: str, seed: int) -> Path:
    """Where a run of an arm lives."""
    return study / "runs" / f"{arm}-{seed}"


def read_plan(path: str | Path, size: str = "", overrides: Sequence[str] = ()) -> Plan:
    """Read a plan, shrink it for a CPU where asked, and apply `a.b=value` overrides such as config.train.steps=8.

    Args:
        size: ``smoke``, for a trial of every command, with one seed; ``small``, for a result; "" for the plan as it is.

    Raises:
        UserError: a file that is no plan, or an override of something that the plan does not have.
    """
    path, raw = _read(path)
    if raw and raw.get("like"):
        _, other = _read(raw["like"])
        raw = merged({name: part for name, part in other.items() if name != "arms"}, raw)
    missing = {"corpus", "config", "arms", "measure"} - set(raw or {})
    unknown = set(raw or {}) - set(_KEYS)
    if missing or unknown:
        at_fault = f"misses {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(unknown))}"
        raise UserError(f"--plan {path} {at_fault}; a plan has {', '.join(_KEYS)}.")
    small = raw.get(size, {})
    if size and not small:
        raise UserError(f"--{size}: {path} does not say how to shrink itself; give it a section `{size}`.")
    arms = []
    # An override has the last word: over what a size shrinks too.
    sections = {name: merged(raw[name], small.get(name, {})) for name in _SHARED}
    if size:
        sections["config"] = _shrunk(sections["config"], small)
    for override in overrides:
        _override(sections | {"arms": raw["arms"]}, override, path)
    for name, entry in raw["arms"].items():
        changes = dict(entry.get("set", {}))
        if size:
            changes = _shrunk(changes, small)
            own = small.get("arms", {}).get(name)
            if own:
                changes["pattern"] = changes["pattern"] | own
        seeds = (0,) if size == "smoke" else tuple(entry.get("seeds", (0,)))
        arms.append(Arm(str(name), str(entry.get("about", "")), seeds, changes))
    return Plan(name="-".join(part for part in (path.stem, size) if part), arms=tuple(arms), **sections)


def _read(path: str | Path) -> tuple[Path, Any]:
    path = Path(path) if Path(path).exists() else FOLDER / Path(path).name
    try:
        return path, read_yaml(path.read_text(encoding="utf-8"), f"plan {path}")
    except OSError:
        plans = ", ".join(sorted(found.name for found in FOLDER.glob("*.yaml")))
        raise UserError(
            f"--plan {path} cannot be read; give one of {plans}, or a file of your own."
        ) from None


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``: sections key by key, `pattern` and `layout` as a whole; null removes a key."""
    found = dict(base)
    for key, value in changes.items():
        old = found.get(key)
        if key not in _WHOLE and isinstance(old, Mapping) and isinstance(value, Mapping):
            found[key] = merged(old, value)
        elif value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found


def _shrunk(changes: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """A section `pattern` or `layout` with a smaller plan's numbers in place of those that it could have."""
    found = dict(changes)
    pattern = found.get("pattern")
    if pattern is not None:
        own = {field.name for field in fields(PATTERNS[pattern["name"]])}
        numbers = small.get("pattern", {})
        # Options over training are shrunk where the arm has them; those of the pattern always.
        found["pattern"] = pattern | {k: v for k, v in numbers.items() if k in own or k in pattern}
    layout = found.get("layout")
    if layout is not None and layout["name"] == "striped":
        found["layout"] = layout | small.get("layout", {})
    return found


def _override(raw: dict[str, Any], override: str, path: Path) -> None:
    name, equals, text = override.partition("=")
    *parents, last = name.split(".")
    place: Any = raw
    for key in parents:
        place = place.get(key) if isinstance(place, dict) else None
    if not equals or not parents or not isinstance(place, dict):
        raise UserError(
            f"--set {override!r} is no part of {path.name}; write for example config.train.steps=8."
        )
    place[last] = read_yaml(text, f"--set {name}")
