"""What `mtraining bench train` measures: model shapes, one training step's settings, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mtraining.errors import UserError
from mtraining.model.recompute import LayerPolicy
from mtraining.pattern import Dense, Pattern, ToeplitzRandom
from mtraining.predict.moments import FULL, MOMENTS
from mtraining.sizes import tokens_text

RECOMPUTE = ("auto", "full", "keep_attention", "none")
LAYOUTS = ("striped", "zigzag", "contiguous")
_K = 1024


@dataclass(frozen=True)
class Shape:
    """A model with random weights, and the sparse index prescribed for it.

    Attributes:
        native: context length that YaRN stretches from.
        window: block diagonals next to the main one that the prescribed index always has.
        columns: columns a head of the prescribed index.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    native: int
    block_size: int = 128
    window: int = 8
    columns: int = 2048
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config_fields(self, seq_len: int, layers: int) -> dict[str, Any]:
        """Fields of a transformers Qwen2Config that covers ``seq_len`` positions."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
        if seq_len > self.native:
            rope = rope | {
                "rope_type": "yarn",
                "factor": seq_len / self.native,
                "original_max_position_embeddings": self.native,
            }
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": max(seq_len, self.native),
            "rope_parameters": rope,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": self.tied,
        }


SHAPES = {
    "qwen2.5-3b": Shape("qwen2.5-3b", 36, 2048, 11008, 16, 2, 151_936, 32 * _K),
    "tiny": Shape("tiny", 2, 64, 96, 4, 2, 256, 256, block_size=16, window=2, columns=16),
}


@dataclass(frozen=True)
class TrainCase:
    """One training step to time.

    Attributes:
        density: computed share of all causal tiles, slashes and columns together; None: dense attention.
        ring: ``flat``, or ``OUTERxINNER`` such as ``2x2``.
        layers: decoder layers.
        kernel: backend of attention.
        fused: how the parts around attention are fused, as `mtraining.parallelize` takes it.
        offload: whether kept tensors wait in host memory.
        policies: what each layer keeps, once ``recompute="auto"`` has chosen that.
        float8, optimizer_state: as the options of `train` that have these names.
    """

    shape: Shape
    seq_len: int
    density: float | None
    layout: str
    ring: str
    recompute: str
    layers: int
    kernel: str = "auto"
    fused: str = "none"
    offload: bool = False
    policies: tuple[LayerPolicy, ...] | None = None
    float8: str = "off"
    optimizer_state: str = FULL

    @property
    def keeps(self) -> tuple[str | tuple[LayerPolicy, ...], bool]:
        """(recompute, offload) as `mtraining.parallelize` takes them. Where ``auto`` has not chosen, all is kept."""
        if self.recompute != "auto":
            return self.recompute, self.offload
        return ("none" if self.policies is None else self.policies), False

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise UserError(
                f"recompute: {self.recompute!r} is not known; choose one of {', '.join(RECOMPUTE)}."
            )
        if self.layout not in LAYOUTS:
            raise UserError(f"layout: {self.layout!r} is not known; choose one of {', '.join(LAYOUTS)}.")
        if self.optimizer_state not in MOMENTS:
            raise UserError(
                f"optimizer_state: {self.optimizer_state!r} is not known; choose one of {', '.join(MOMENTS)}."
            )
        if self.layers < 1 or self.seq_len < 1:
            raise UserError(f"layers={self.layers}, seq_len={self.seq_len}: both must be at least 1.")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density: {self.density} must be a share between 0 and 1, such as 0.05.")
        self.outer(None)

    def pattern(self, *, estimate: bool = True) -> Pattern:
        """Dense, or the prescribed index; with ``estimate``, what vertical-slash would choose is found too and dropped.

        Raises:
            UserError: a density that the window and the columns alone exceed.
        """
        size = self.shape.block_size
        if self.density is None:
            return Dense(block_size=size)
        slashes = self.density - self.shape.columns / self.seq_len
        if slashes <= 0:
            raise UserError(
                f"density: {self.shape.columns} columns are {self.shape.columns / self.seq_len:.4f} of {self.seq_len} "
                "tokens already; use a larger density."
            )
        return ToeplitzRandom(
            size,
            density=slashes,
            window=self.shape.window,
            columns=self.shape.columns,
            with_estimation=estimate,
        )

    def outer(self, world: int | None) -> int:
        """The number of outer groups on ``world`` ranks; with None only the form of ``ring`` is checked.

        Raises:
            UserError: a ring that is not of this form or of this many ranks.
        """
        if self.ring == "flat":
            return 1
        parts = self.ring.split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"ring: {self.ring!r} is not known; use flat, or OUTERxINNER such as 2x2.")
        outer, inner = map(int, parts)
        if world is not None and outer * inner != world:
            raise UserError(
                f"ring: {self.ring} is a ring of {outer * inner} ranks, and there are {world}; use flat."
            )
        return outer

    def describe(self) -> str:
        what = "dense" if self.density is None else f"{self.density:.1%} sparse"
        extras = [f"fused {self.fused}"] * (self.fused != "none") + ["offload"] * self.offload
        extras += [f"float8 {self.float8}"] * (self.float8 != "off")
        extras += [f"optimizer state {self.optimizer_state}"] * (self.optimizer_state != FULL)
        return ", ".join(
            [
                f"{tokens_text(self.seq_len)} {what}",
                f"{self.layout} {self.ring}",
                f"recompute {self.recompute}",
                f"{self.layers} layers",
                f"kernel {self.kernel}",
                *extras,
            ]
        )


@dataclass(frozen=True)
class Group:
    """Cases around a base: the first value of each list. Each further value of the others varies alone; every
    length and recompute policy has all of them, with the dense step (zigzag, flat) first."""

    seq_len: Sequence[int]
    density: Sequence[float] = (0.05,)
    layout: Sequence[str] = ("striped",)
    ring: Sequence[str] = ("flat",)
    recompute: Sequence[str] = ("keep_attention",)
    dense: bool = True
    layers: int | None = None  # None: the shape's own
    kernel: str = "auto"
    dense_kernel: str = "auto"
    fused: str = "none"
    offload: bool = False
    float8: str = "off"
    optimizer_state: str = FULL

    def cases(self, shape: Shape) -> Iterator[TrainCase]:
        for seq_len, recompute in product(self.seq_len, self.recompute):
            base = TrainCase(
                shape, seq_len, self.density[0], self.layout[0], self.ring[0], recompute,
                shape.layers if self.layers is None else self.layers, self.kernel, self.fused, self.offload,
                float8=self.float8, optimizer_state=self.optimizer_state,
            )  # fmt: skip
            if self.dense:
                yield replace(base, density=None, layout="zigzag", ring="flat", kernel=self.dense_kernel)
            yield base
            yield from (replace(base, density=density) for density in self.density[1:])
            yield from (replace(base, layout=layout) for layout in self.layout[1:])
            yield from (replace(base, ring=ring) for ring in self.ring[1:])


# What 5 % of 512K computes for a token.
_FIXED_BUDGET = ((128 * _K, 0.2), (256 * _K, 0.1), (1024 * _K, 0.025))
PRESETS: dict[str, tuple[str, tuple[Group, ...]]] = {
    "table": (
        "qwen2.5-3b",
        (
            Group((512 * _K,), (0.05, 0.1), LAYOUTS, ("flat", "2x2")),
            *(Group((length,), (density,), dense=length <= 256 * _K) for length, density in _FIXED_BUDGET),
            Group((1024 * _K,), (0.025,), layers=4),
        ),
    ),
    "tiny": ("tiny", (Group((512,), (0.4,), LAYOUTS),)),
}


def parse_tokens(text: str) -> int:
    """512K -> 524288.

    Raises:
        UserError: not a number of tokens.
    """
    digits, factor = text.strip(), 1
    if digits[-1:].upper() in ("K", "M"):
        digits, factor = digits[:-1], _K if digits[-1].upper() == "K" else _K * _K
    if not digits.isdigit() or int(digits) < 1:
        raise UserError(f"seq-len: {text!r} is not a number of tokens; use for example 131072, 512K or 1M.")
    return int(digits) * factor
