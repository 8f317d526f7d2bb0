"""The configuration of a run: typed sections, read from YAML, with dotted overrides.

A configuration is read once, checked at once (`load_config`), handed around frozen, and written whole, defaults
included, into the run folder. Unknown keys are refused with the nearest known name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mtraining.data.windows import LOOK_AHEAD
from mtraining.errors import UserError
from mtraining.inputs.sections import Section, read_section
from mtraining.inputs.yaml_text import read_yaml, write_yaml
from mtraining.model import Anneal, ModelOptions, Refresh
from mtraining.model.float8_checks import Float8
from mtraining.pattern import Dense, Pattern, build_pattern, load_table, options_of
from mtraining.train.evaluate_section import EvaluateSection
from mtraining.train.policy import check_allow
from mtraining.train.store import CheckpointStore

# Ranks give a sign of life every second, and a busy machine may hold them up for several.
LEAST_SILENCE_SECONDS = 10


class SourceSection(Section):
    """One of the folders that a run mixes.

    Attributes:
        path: a folder written by `mtraining prepare`.
        name: in metrics and messages; null is the name of the folder.
        weight: its share of the sequences, relative to the weights of the others.
        max_epochs: how often its sequences are read at most. The others share its weight from then on. null has no end.
    """

    path: Path
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def label(self) -> str:
        """`name`, or what stands for it."""
        return self.name or self.path.resolve().name


class DataSection(Section):
    """Where the tokens come from.

    Attributes:
        path: a folder written by `mtraining prepare`.
        sources: several folders in place of `path`, mixed by weight.
        mode: `documents` leaves out documents shorter than the context, and no sequence crosses a document's end;
            `concat` fills sequences across ends; `packed` fills sequences with whole documents, none of which sees
            another.
        look_ahead: documents that wait to be packed at one time. More of them leave less padding.
        workers: processes that read batches ahead, for each rank; 0 reads in the rank itself.
        allow_other_tokenizer: take data that another tokenizer than the model's has encoded, which is refused
            otherwise.
    """

    path: Path | None = None
    sources: tuple[SourceSection, ...] = ()
    mode: Literal["documents", "concat", "packed"] = "documents"
    look_ahead: PositiveInt = LOOK_AHEAD
    workers: NonNegativeInt = 0
    allow_other_tokenizer: bool = False

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> DataSection:
        if (self.path is None) == (not self.sources):
            raise ValueError(
                "data.path or data.sources says where the tokens are; give one of them, with the folders that "
                "`mtraining prepare` wrote"
            )
        labels = [source.label for source in self.every_source]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"data.sources: two are named {label!r}; give each a name of its own")
        if self.look_ahead != LOOK_AHEAD and self.mode != "packed":
            raise ValueError(
                f"data.look_ahead has no effect with mode={self.mode}; remove it, or set data.mode=packed"
            )
        return self

    @property
    def every_source(self) -> tuple[SourceSection, ...]:
        """The folders, one where `path` names it."""
        return self.sources if self.path is None else (SourceSection(path=self.path),)

    @property
    def named(self) -> str:
        """The option that names the folders, with its value, for messages."""
        if self.path is not None:
            return f"data.path={self.path}"
        return f"data.sources ({', '.join(str(source.path) for source in self.sources)})"


class PatternChoice(Section):
    """A pattern by `name`; every other key is an option of that pattern. All of its options are kept, those that were
    not given with their defaults.

    Attributes:
        name: which pattern.
    """

    model_config = ConfigDict(extra="allow")
    name: str = "vertical_slash"

    @model_validator(mode="before")
    @classmethod
    def _every_option(cls, raw: Any) -> Any:
        name = raw.get("name", cls.model_fields["name"].default) if isinstance(raw, Mapping) else None
        if not isinstance(name, str) or not all(isinstance(key, str) for key in raw):
            return raw  # pydantic says what is wrong with it
        own = {key: value for key, value in raw.items() if key in cls.model_fields}
        given = {key: value for key, value in raw.items() if key not in cls.model_fields}
        return own | {"name": name} | options_of(build_pattern(name, **given))

    @property
    def options(self) -> dict[str, Any]:
        """The pattern's own options, as keyword arguments for `mtraining.pattern.build_pattern`."""
        return dict(self.model_extra or {})

    def build(self) -> Pattern:
        """The pattern itself; `UserError` for an unknown name or option."""
        return build_pattern(self.name, **self.options)


class AnnealSection(Section):
    """Steps that are dense, and budgets that shrink over training. Steps count from 1.

    Attributes:
        dense_first: steps at the beginning that attend to everything.
        dense_every: every so many steps, one attends to everything; 0: none does.
        widen: how many times as large budgets are in the first step; 1 leaves them as they are.
        widen_steps: steps in which that factor falls to 1, by the same ratio at each.
    """

    dense_first: NonNegativeInt = 0
    dense_every: NonNegativeInt = 0
    widen: float = 1.0
    widen_steps: NonNegativeInt = 0

    @model_validator(mode="after")
    def _is_known(self) -> AnnealSection:
        try:
            self.build()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def build(self) -> Anneal:
        """What `mtraining.model.parallelize` takes."""
        return Anneal(**self.model_dump())


class PatternSection(PatternChoice):
    """What attention computes, and when it is chosen anew.

    Attributes:
        name: which pattern; its own options stand beside it.
        table: a file with the patterns of every layer and head, written by `mtraining calibrate`, or one of the
            authors' MInference files. The options beside it are what its entries start from.
        dense_layers: how many of the first layers are dense.
        refresh: when the index is estimated: `every_step`, `{every_n: k}` or `{frozen_at: step}`. Steps count from 1.
        coverage: extra block diagonals rotate with the step, so that every distance receives gradient within this many
            steps; 0 adds none.
        anneal: steps of dense attention, and budgets that shrink over training.
    """

    table: Path | None = None
    dense_layers: NonNegativeInt = 0
    refresh: Literal["every_step"] | dict[Literal["every_n", "frozen_at"], PositiveInt] = "every_step"
    coverage: NonNegativeInt = 0
    anneal: AnnealSection = AnnealSection()

    @field_validator("refresh", mode="before")
    @classmethod
    def _refresh_is_known(cls, value: Any) -> Any:
        try:
            Refresh.parse(value)
        except UserError as error:
            raise ValueError(str(error).removeprefix("pattern.refresh: ")) from None
        return value

    @cached_property
    def layers(self) -> dict[int, Pattern]:
        """The layers that have patterns of their own; `UserError` for a table that cannot be read."""
        found = {}
        if self.table is not None:
            found = dict(enumerate(load_table(self.table, self.name, **self.options)))
        return found | dict.fromkeys(range(self.dense_layers), Dense(block_size=self.build().block_size))


class LayoutSection(Section):
    """Who holds which tokens.

    Attributes:
        name: `striped`, `zigzag` or `contiguous`.
        unit: tokens in a stripe, a multiple of `pattern.block_size`; only `striped` reads it.
    """

    name: str = "striped"
    unit: PositiveInt = 128


class ParallelSection(Section):
    """The process grid: `dp` x `cp` processes.

    Attributes:
        dp: groups of processes with different sequences.
        cp: processes that share one sequence.
        cp_outer: nodes among the `cp` processes, each a ring of its own; divides `cp`. 1 is a flat ring.
    """

    dp: PositiveInt = 1
    cp: PositiveInt = 1
    cp_outer: PositiveInt = 1

    @property
    def world(self) -> int:
        """The number of processes the grid needs."""
        return self.dp * self.cp

    @model_validator(mode="after")
    def _outer_divides(self) -> ParallelSection:
        if self.cp % self.cp_outer:
            raise ValueError(f"cp_outer={self.cp_outer} must divide cp={self.cp}")
        return self


class TrainSection(Section):
    """The optimisation. Batch sizes count sequences.

    Attributes:
        seq_len: tokens in a sequence.
        steps: optimizer steps of the whole run.
        batch_size: sequences in one optimizer step, over all replicas.
        micro_batch_size: sequences that one replica forwards at once; the rest of the batch is gradient accumulation.
        lr: the highest learning rate.
        min_lr: the learning rate at the end, where the schedule falls.
        schedule: what the learning rate does after the warm-up, as transformers' schedules do. `wsd` (warm-up, stable,
            decay) keeps the peak until the last `decay_steps`.
        warmup_steps: steps in which the learning rate rises linearly from zero.
        decay_steps: steps of the last phase of `wsd`.
        decay: how the last phase of `wsd` falls.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decay of weights.
        clip: the largest norm of the gradient; null does not clip.
        dtype: what layers compute in.
        recompute: what backward computes again. `full`: each layer, from its input. `keep_attention`: the same without
            attention. `none`: nothing. `auto`: as little as the GPU's memory allows, chosen for each layer.
        offload: what recompute keeps waits in pinned host memory; `auto` then uses that memory where it saves time.
        fused: how norms, rotary embedding, MLP and the loss's softmax are computed: by transformers, by
            torch.compile, or by liger-kernel.
        float8: products of the linear layers of decoder layers, on GPUs of compute capability 8.9 or newer. `rowwise`:
            in float8, a scale for each row. `tensorwise`: one scale for each operand, which is faster and rounds more.
            `emulated`, `emulated_tensorwise`: the same roundings on any device, slowly.
        optimizer_state: AdamW's two moments. `full`: in the dtype of the weights. `8bit`: in 8 bits, with an fp32 scale
            for each block. `offload`: as `full`, in pinned host memory; on a CPU it stays where it is.
        loss_chunk: tokens whose logits exist at one time.
        kernel: which attention kernels: `auto`, `reference`, `triton`, `flash4`, `cudnn` or `flash`.
        deterministic: operations and dense kernels that repeat bit for bit. PyTorch warns of one that has no such form.
        seed: of the order of the data, and of what a model draws in training.
    """

    seq_len: PositiveInt
    steps: PositiveInt
    batch_size: PositiveInt = 1
    micro_batch_size: PositiveInt = 1
    lr: PositiveFloat = 2e-5
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    decay: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat | None = 1.0
    dtype: Literal["bf16", "fp32"] = "fp32"
    recompute: Literal["auto", "full", "keep_attention", "none"] = "full"
    offload: bool = False
    fused: Literal["none", "compile", "liger"] = "none"
    float8: Float8 = "off"
    optimizer_state: Literal["full", "8bit", "offload"] = "full"
    loss_chunk: PositiveInt = 8192
    kernel: str = "auto"
    deterministic: bool = False
    seed: int = 0

    @field_validator("float8", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value

    @property
    def compute(self) -> torch.dtype:
        """`dtype`, as torch has it."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


class CheckpointSection(Section):
    """When and what to save.

    Attributes:
        every: steps between checkpoints; 0 saves at the end only, be it one that a signal asks for.
        keep_last: checkpoints that stay; older ones are removed.
        async: write in the background while training goes on.
        resume: `auto` resumes from the newest complete checkpoint of the run folder; `never` refuses a folder that
            holds one; `best` goes back to the checkpoint of the lowest held-out loss; a path names one checkpoint.
        allow: what may differ from the checkpoint although a change of it is refused, such as `data.path` or
            `model.rope` (docs/resume.md).
        export: write a Hugging Face folder at the end of the run.
    """

    every: NonNegativeInt = 100
    keep_last: PositiveInt = 2
    asynchronous: bool = Field(default=True, alias="async")
    resume: str = "auto"
    allow: tuple[str, ...] = ()
    export: bool = True

    @field_validator("allow")
    @classmethod
    def _allow_lifts_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_allow(value)
        return value


class LogSection(Section):
    """Loss, speed and memory are logged at every step.

    Attributes:
        every: steps between attention statistics, which wait for the device.
        trackers: where metrics are shown beside `metrics.jsonl`: `tensorboard`, `wandb`, `mlflow`, `trackio`. A resumed
            run goes on in the same run of each.
        project: the project, or experiment, of the trackers' runs.
        recall_rows: query rows that are compared with dense attention for the recall; 0 turns it off.
    """

    every: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    project: str = Field(default="mtraining", min_length=1)
    recall_rows: NonNegativeInt = 0

    @field_validator("trackers")
    @classmethod
    def _trackers_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"{name} stands twice; keep one of them")
        return value

    @model_validator(mode="before")
    @classmethod
    def _before_trackers_had_names(cls, raw: Any) -> Any:
        """Run folders of before have `tensorboard`."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("tensorboard"), bool):
            return raw
        rest = {key: value for key, value in raw.items() if key != "tensorboard"}
        return {"trackers": ["tensorboard"] if raw["tensorboard"] else [], **rest}


class DistributedSection(Section):
    """Process groups: gloo on CPUs, NCCL on GPUs.

    Attributes:
        timeout_seconds: a collective that waits longer ends the run.
        silence_seconds: a rank that has given no sign of life for so long ends the run. It is for what cannot be told
            from a slow rank, such as a machine without power: a process that has ended is noticed within seconds.
        device: `auto` takes GPUs where there are any.
    """

    timeout_seconds: PositiveFloat = 600.0
    silence_seconds: float = Field(default=300.0, allow_inf_nan=False)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("silence_seconds")
    @classmethod
    def _silence_is_long(cls, value: float) -> float:
        if value < LEAST_SILENCE_SECONDS:
            raise ValueError(
                f"silence_seconds={value:g} would end healthy runs on a busy machine; "
                f"use {LEAST_SILENCE_SECONDS} or more"
            )
        return value


class Config(Section):
    """A whole run.

    Attributes:
        output: the run folder.
        layer_patterns: patterns of single layers, by number. They come before `pattern.dense_layers`, and that before
            `pattern.table`.
    """

    output: Path
    model: ModelOptions
    data: DataSection
    train: TrainSection
    pattern: PatternSection = PatternSection()
    layer_patterns: dict[NonNegativeInt, PatternChoice] = Field(default_factory=dict)
    layout: LayoutSection = LayoutSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()
    distributed: DistributedSection = DistributedSection()

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("layer_patterns", mode="before")
    @classmethod
    def _layer_patterns_by_name(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        # 0 and "0" are two keys of a file and one layer.
        layers = [str(layer) for layer in value]
        for layer in layers:
            if layers.count(layer) > 1:
                raise ValueError(f"layer {layer} stands twice; keep one of them")
        return {layer: {"name": item} if isinstance(item, str) else item for layer, item in value.items()}

    @field_validator("layout", mode="before")
    @classmethod
    def _layout_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _batch_divides(self) -> Config:
        per_round = self.parallel.dp * self.train.micro_batch_size
        if self.train.batch_size % per_round:
            nearest = max(1, round(self.train.batch_size / per_round)) * per_round
            raise ValueError(
                f"train.batch_size={self.train.batch_size} must be a multiple of parallel.dp x "
                f"train.micro_batch_size = {per_round}; the nearest is {nearest}"
            )
        return self

    @cached_property
    def patterns_by_layer(self) -> dict[int, Pattern]:
        """Every layer whose pattern is not `pattern` itself."""
        return self.pattern.layers | {layer: choice.build() for layer, choice in self.layer_patterns.items()}

    @property
    def accumulation(self) -> int:
        """Micro-batches that each replica runs before one optimizer step."""
        return self.train.batch_size // (self.parallel.dp * self.train.micro_batch_size)

    @property
    def evaluate_lengths(self) -> tuple[int, ...]:
        """Tokens of the sequences that evaluation reads, ascending."""
        return tuple(sorted(self.evaluate.lengths)) or (self.train.seq_len,)

    @property
    def resume_path(self) -> Path:
        """The checkpoint that `checkpoint.resume` names: a path, `best`, or the name of one in the run folder."""
        return CheckpointStore(self.output).find(self.checkpoint.resume)

    def to_yaml(self) -> str:
        """Every option, defaults included, in a form that `load_config` reads back to an equal configuration."""
        return write_yaml(self.model_dump(mode="json", by_alias=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values parsed as YAML), and check everything.

    Raises `UserError` with one sentence for a missing file, malformed YAML, an unknown key or a bad value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"configuration file {path} does not exist; the recipes/ folder holds examples."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}.") from None
    raw = read_yaml(text, f"configuration file {path}")
    if not isinstance(raw, dict):
        raise UserError(
            f"configuration file {path} must hold a mapping of sections, such as 'model:' and 'train:'."
        )
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, source=str(path))


def parse_config(raw: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Check a mapping of sections; `source` names it in error messages."""
    return read_section(Config, raw, source)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override!r} is not of the form section.key=value, such as train.steps=20.")
    value = read_yaml(text, f"--set {override!r}: the value")
    node: Any = raw
    for depth, part in enumerate(parts[:-1]):
        found = _key(node, part)
        named = parts[:depth] == ["layer_patterns"] or (depth == 0 and part in ("pattern", "layout"))
        if named and isinstance(node.get(found), str):
            node[found] = {"name": node[found]}
        if node.get(found) is None:
            node[found] = {}
        node = node[found]
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section.")
    node[_key(node, parts[-1])] = value


def _key(section: Mapping[Any, Any], text: str) -> Any:
    """The key that reads as ``text``: layers are numbers in a file."""
    return next((key for key in section if str(key) == text), text)
