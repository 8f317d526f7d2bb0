"""What a resumed run does with every option of the configuration. docs/resume.md shows this table.

An option without a row here fails a test: whoever adds an option decides what happens when it changes at a resume.
`python -m mtraining.train.policy docs/resume.md` writes the table into the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import xxhash
from pydantic import BaseModel

from mtraining.errors import UserError
from mtraining.model import Refresh

if TYPE_CHECKING:
    from mtraining.train.config import Config

Rule = Literal["free", "told", "refused", "content"]
MEANING: dict[Rule, str] = {
    "free": "may change, nothing is said",
    "told": "may change; the new value holds from the resumed step on, one line says so",
    "refused": "a change is refused, unless `checkpoint.allow` names the option",
    "content": "what it stands for is compared; a difference is refused, unless `checkpoint.allow` names it",
}


class Policy(NamedTuple):
    """One row: the rule, and why, or what counts."""

    rule: Rule
    why: str


_ORDER = "fixes which samples a step sees, so the place in the data would be lost"
_ROUNDING = "same mathematics, other rounding"
_SAME = "same numbers"
_STEP = "a function of the step: the new curve holds"
_ADAPTER = "the shapes of what is trained, or how it is added, would change"
_ROPE = "the model that results is compared: its rotary settings"
_BESIDE = "training is the same"
_MEASURE = "another measure from here on, and the best checkpoint is sought anew; training is the same"
_ATTENDS = "what attention computes from here on"

POLICIES: dict[str, Policy] = {
    "output": Policy("free", "a run folder may be moved"),
    "model.init": Policy(
        "content",
        "the first weights only; the model that results is compared, and the weights under an adapter",
    ),
    "model.config": Policy("content", "the model that results is compared, field by field"),
    "model.tokenizer": Policy("told", "goes into the export"),
    "model.weights_prefix": Policy("free", "of the names of the first weights, which are past"),
    "model.dtype": Policy("told", "the stored weights and both moments are cast"),
    "model.seed": Policy("refused", "of the first weights, which are past"),
    "model.rope.type": Policy("content", _ROPE),
    "model.rope.factor": Policy("content", _ROPE),
    "model.rope.original_max_position_embeddings": Policy("content", _ROPE),
    "model.rope.beta_fast": Policy("content", _ROPE),
    "model.rope.beta_slow": Policy("content", _ROPE),
    "model.rope.attention_factor": Policy("content", _ROPE),
    "model.rope.truncate": Policy("content", _ROPE),
    "model.rope.mscale": Policy("content", _ROPE),
    "model.rope.mscale_all_dim": Policy("content", _ROPE),
    "model.rope.theta": Policy("content", _ROPE),
    "model.lora.r": Policy("refused", _ADAPTER),
    "model.lora.alpha": Policy("refused", _ADAPTER),
    "model.lora.targets": Policy("refused", _ADAPTER),
    "model.lora.also_train": Policy("refused", _ADAPTER),
    "model.lora.dropout": Policy("told", "what is dropped from here on"),
    "model.lora.rslora": Policy("refused", _ADAPTER),
    "data.path": Policy("content", "documents and tokens are compared, wherever they lie"),
    "data.sources": Policy(
        "content", "the documents, weight and cap of each are compared, in order; names may change"
    ),
    "data.mode": Policy("refused", _ORDER),
    "data.look_ahead": Policy("refused", _ORDER),
    "data.workers": Policy("free", _SAME),
    "data.allow_other_tokenizer": Policy("free", "the data that result are compared"),
    "train.seq_len": Policy("refused", _ORDER),
    "train.steps": Policy("told", "fewer than are done is refused; a schedule that falls ends elsewhere"),
    "train.batch_size": Policy("refused", _ORDER),
    "train.micro_batch_size": Policy("told", _ROUNDING),
    "train.lr": Policy("told", _STEP),
    "train.min_lr": Policy("told", _STEP),
    "train.schedule": Policy("told", _STEP),
    "train.warmup_steps": Policy("told", _STEP),
    "train.decay_steps": Policy("told", _STEP),
    "train.decay": Policy("told", _STEP),
    "train.betas": Policy("told", "moments are kept"),
    "train.eps": Policy("told", "moments are kept"),
    "train.weight_decay": Policy("told", "moments are kept"),
    "train.clip": Policy("told", "moments are kept"),
    "train.dtype": Policy("told", "the dtype of computing"),
    "train.recompute": Policy("free", _SAME),
    "train.offload": Policy("free", _SAME),
    "train.fused": Policy("told", _ROUNDING),
    "train.float8": Policy("told", "the rounding of products; what is saved has the same form"),
    "train.optimizer_state": Policy(
        "told", "moments are converted; `full` and `offload` have the same numbers"
    ),
    "train.loss_chunk": Policy("told", _ROUNDING),
    "train.kernel": Policy("told", _ROUNDING),
    "train.deterministic": Policy("told", _ROUNDING),
    "train.seed": Policy("refused", _ORDER),
    "pattern.name": Policy("told", _ATTENDS),
    "pattern.*": Policy("told", "the pattern's own options: " + _ATTENDS),
    "pattern.table": Policy("told", "by its content: " + _ATTENDS),
    "pattern.dense_layers": Policy("told", _ATTENDS),
    "pattern.refresh": Policy("told", "a step that needs indices which the checkpoint lacks is refused"),
    "pattern.coverage": Policy("told", _ATTENDS),
    "pattern.anneal.dense_first": Policy("told", _STEP),
    "pattern.anneal.dense_every": Policy("told", _STEP),
    "pattern.anneal.widen": Policy("told", _STEP),
    "pattern.anneal.widen_steps": Policy("told", _STEP),
    "layer_patterns": Policy("told", _ATTENDS),
    "layout.name": Policy("told", _ROUNDING),
    "layout.unit": Policy("told", _ROUNDING),
    "parallel.dp": Policy("told", _ROUNDING),
    "parallel.cp": Policy("told", _ROUNDING),
    "parallel.cp_outer": Policy("told", _ROUNDING),
    "checkpoint.every": Policy("free", "what is saved is the same"),
    "checkpoint.keep_last": Policy("free", "what is saved is the same"),
    "checkpoint.async": Policy("free", "what is saved is the same"),
    "checkpoint.resume": Policy("free", "says where to go on from"),
    "checkpoint.allow": Policy("free", "says which refusals to lift"),
    "checkpoint.export": Policy("free", _SAME),
    "evaluate.every": Policy("free", _BESIDE),
    "evaluate.at_start": Policy("free", _BESIDE),
    "evaluate.data": Policy("told", _MEASURE),
    "evaluate.suites": Policy("free", _BESIDE),
    "evaluate.lengths": Policy("told", _MEASURE),
    "evaluate.attention": Policy("told", _MEASURE),
    "evaluate.max_sequences": Policy("told", _MEASURE),
    "evaluate.bucket": Policy("free", _BESIDE),
    "evaluate.keep_best": Policy("free", "what is saved is the same"),
    "evaluate.needle_samples": Policy("told", "other questions from here on; training is the same"),
    "evaluate.essays": Policy("told", "other questions from here on; training is the same"),
    "evaluate.seed": Policy("told", "other questions from here on; training is the same"),
    "log.every": Policy("free", _SAME),
    "log.trackers": Policy("free", _SAME),
    "log.project": Policy("free", "of runs of trackers that begin"),
    "log.recall_rows": Policy("free", _SAME),
    "distributed.timeout_seconds": Policy("free", _SAME),
    "distributed.silence_seconds": Policy("free", _SAME),
    "distributed.device": Policy("told", _ROUNDING),
}
# What training holds, adds or changes by step; an evaluation has no part in it.
OVER_STEPS = ("pattern.refresh", "pattern.coverage", "pattern.anneal.")
OPEN = ("pattern.*",)  # keys that are free in the configuration share a row


@dataclass(frozen=True)
class Change:
    """An option, or a part of the model or the data, that is not what it was: it holds from step `step` on."""

    step: int
    option: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.option}: {shown(self.old)} -> {shown(self.new)}"


def policy(option: str) -> Policy:
    """The row of an option, a pattern's own options included."""
    return POLICIES[option] if option in POLICIES else POLICIES[f"{option.rpartition('.')[0]}.*"]


def declared_options(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every option that a section of the configuration declares, nested ones too."""
    for name, info in model.model_fields.items():
        option = prefix + (info.alias or name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from declared_options(info.annotation, option + ".")
        else:
            yield option


def flat_options(config: Config) -> dict[str, Any]:
    """Every option by its dotted name, as a checkpoint keeps it: values of JSON, a pattern's own options with their
    defaults, and the content of a table beside its path."""

    def walk(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, info in type(section).model_fields.items():
            value, option = getattr(section, name), prefix + (info.alias or name)
            if isinstance(value, BaseModel):
                yield from walk(value, option + ".")
            else:
                yield option, section.model_dump(mode="json", include={name})[name]

    found = dict(walk(config, ""))
    found |= {f"pattern.{name}": value for name, value in asdict(config.pattern.build()).items()}
    found["layer_patterns"] = {
        str(layer): {"name": choice.name} | asdict(choice.build())
        for layer, choice in config.layer_patterns.items()
    }
    if config.pattern.table is not None:
        content = xxhash.xxh3_64_hexdigest(config.pattern.table.read_bytes())
        found["pattern.table"] = f"{config.pattern.table} (content {content})"
    return dict(json.loads(json.dumps(found, default=str)))


def allowed(option: str, allow: tuple[str, ...]) -> bool:
    """Whether `checkpoint.allow` names an option, or the section that it is in."""
    return any(option == name or option.startswith(name + ".") for name in allow)


def check_allow(allow: tuple[str, ...]) -> None:
    """Refuse a name in `checkpoint.allow` that would lift no refusal; ValueError with the names that would."""
    refused = [option for option, row in POLICIES.items() if row.rule in ("refused", "content")]
    for name in allow:
        if not any(allowed(option, (name,)) for option in refused) and not name.startswith("model.config."):
            known = ["data.path", "data.sources", "model.rope", "model.config"]
            known += [option for option in refused if POLICIES[option].rule == "refused"]
            raise ValueError(
                f"{name!r} names no option whose change is refused; those are {', '.join(known)}, and a section stands "
                "for all of its options"
            )


def check_steps(config: Config, checkpoint: Path, done: int) -> None:
    """Refuse a run that asks for fewer steps than the checkpoint it would go on from has behind it."""
    if config.train.steps < done:
        raise UserError(
            f"train.steps={config.train.steps}, and step {done} is there already ({checkpoint}), so nothing is trained "
            f"or exported; use train.steps={done} or more, or name an earlier one in checkpoint.resume to go back."
        )


def option_changes(config: Config, then: Mapping[str, Any], done: int) -> list[Change]:
    """The options that are not what they were when the checkpoint was written, but for those that may change freely
    and those whose content is compared instead. Options that the checkpoint does not know are left aside.

    Args:
        then: the options of the checkpoint.
        done: steps done there.

    Raises:
        UserError: a change of what attention computes, while `pattern.refresh` holds what it computed before.
    """
    changes = []
    for option, new in flat_options(config).items():
        if option in then and then[option] != new and policy(option).rule in ("told", "refused"):
            changes.append(
                Change(_first_step(config, option, then[option], new, done), option, then[option], new)
            )
    return changes


def _first_step(config: Config, option: str, old: Any, new: Any, done: int) -> int:
    """The first step that a new value shows in: the next one, or the next that estimates anew."""
    if option.startswith(OVER_STEPS) or not option.startswith(("pattern.", "layer_patterns")):
        return done + 1
    refresh = Refresh.parse(config.pattern.refresh)
    if refresh.frozen_at is not None and refresh.frozen_at <= done:
        raise UserError(
            f"{option}: {shown(old)} -> {shown(new)} cannot take effect: pattern.refresh has frozen the indices of "
            f"step {refresh.frozen_at}; restore {option}={shown(old)}, or set pattern.refresh to every_step."
        )
    return next(step for step in range(done + 1, done + 1 + refresh.every_n) if refresh.estimates(step))


def shown(value: Any) -> str:
    """A value as YAML would have it, on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def table() -> str:
    """The table of docs/resume.md."""
    rows = ["| option | a change | why, or what counts |", "|---|---|---|"]
    rows += [f"| `{option}` | {row.rule} | {row.why} |" for option, row in POLICIES.items()]
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """docs/resume.md with its table as it must be."""
    start, end = "<!-- the table begins -->\n", "<!-- the table ends -->"
    before, _, rest = page.partition(start)
    return before + start + table() + end + rest.partition(end)[2]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text(encoding="utf-8")), encoding="utf-8")
