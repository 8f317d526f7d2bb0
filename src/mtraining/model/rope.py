"""Context extension: rotary settings written into the model's config before it is built.

Whatever the method, the frequencies are fixed before the first step. transformers' own ``dynamic`` and
``longrope`` types choose frequencies in each forward from the largest position *this process* sees. Under
context parallelism ranks see different positions, so :func:`mtraining.model.fix_rope` chooses once, from the length of
the whole sequence. Our ``dynamic`` is resolved at the training length into a plain theta.

Where rotary settings differ by layer type, as in Gemma 3, those of full attention alone are stretched: a window's
distances stay what they were.
"""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import Any

from mtraining.errors import UserError
from mtraining.model.options import RopeOptions
from mtraining.model.support import check_rope, ropes_of
from mtraining.model.windows import FULL

logger = logging.getLogger(__name__)


_YARN = ("beta_fast", "beta_slow", "attention_factor", "truncate", "mscale", "mscale_all_dim")


def apply_rope(config: Any, options: RopeOptions, seq_len: int) -> None:
    """Write ``options`` into ``config`` (in place) so that it covers ``seq_len`` positions, or refuse.

    After the call ``config.max_position_embeddings >= seq_len`` and ``config.rope_parameters`` is what the
    model is built with and what export saves.

    Args:
        config: a transformers config, before the model is built.
        options: the `model.rope` section.
        seq_len: training length in tokens.

    Raises:
        UserError: the options do not cover ``seq_len``, or contradict each other or the model.
    """
    _refuse_idle_options(options)
    check_rope(config)
    ropes = ropes_of(config)
    changed = options.type != "none" or options.theta is not None
    kind = None if None in ropes else FULL
    if changed and kind not in ropes:
        raise UserError(
            f"model.rope: {config.model_type} has no rotary embedding in its layers of full attention "
            "(rope_parameters) to change; remove model.rope, or use a model with rotary positions."
        )
    if options.type == "none":
        _keep(config, kind, options, seq_len)
    else:
        _extend(config, kind, options, seq_len)
    check_rope(config)
    if not ropes:
        return
    try:
        config.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.rope.type={options.type}: transformers refuses these rotary settings for {config.model_type} "
            f"({error}); use another type, or another model."
        ) from error


def _refuse_idle_options(options: RopeOptions) -> None:
    """An option that the chosen type does not read is a mistake, not a no-op."""
    idle = {
        "none": ("factor", "original_max_position_embeddings", *_YARN),
        "yarn": (),
        "linear": _YARN,
        "dynamic": _YARN,
    }[options.type]
    for name in idle:
        if getattr(options, name) is not None:
            raise UserError(
                f"model.rope.{name} has no effect with type={options.type}; remove it or change model.rope.type."
            )


def _replace(config: Any, kind: str | None, parameters: dict[str, Any]) -> None:
    """New rotary settings of the layers of type ``kind``; None: of all."""
    config.rope_parameters = parameters if kind is None else {**config.rope_parameters, kind: parameters}


def _keep(config: Any, kind: str | None, options: RopeOptions, seq_len: int) -> None:
    if options.theta is not None:
        _replace(config, kind, {**ropes_of(config)[kind], "rope_theta": float(options.theta)})
        config.max_position_embeddings = max(config.max_position_embeddings, seq_len)
    covered = config.max_position_embeddings
    if seq_len > covered and not ropes_of(config):
        raise UserError(
            f"model.rope: the training length {seq_len} is beyond the {covered} positions of the model, which are not "
            f"rotary and cannot be stretched; set train.seq_len to at most {covered}."
        )
    if seq_len > covered:
        raise UserError(
            f"model.rope: the training length {seq_len} is beyond the {covered} positions of the model; set "
            f"model.rope.type "
            f"to yarn with a factor of at least {_shortest_factor(seq_len, covered)} (or to linear or dynamic)."
        )


def _extend(config: Any, kind: str | None, options: RopeOptions, seq_len: int) -> None:
    present = ropes_of(config)[kind]
    again = options.type == present.get("rope_type") == "yarn"
    native = options.original_max_position_embeddings
    if native is None and again:
        native = int(present["original_max_position_embeddings"])
    if native is None and present.get("rope_type", "default") != "default":
        raise UserError(
            f"model.rope: the model already has rope type {present.get('rope_type')!r}; to replace it by "
            f"{options.type} set model.rope.original_max_position_embeddings to the context that factor counts from."
        )
    native = native or config.max_position_embeddings
    theta = float(options.theta or present["rope_theta"])
    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if "partial_rotary_factor" in present:
        parameters["partial_rotary_factor"] = present["partial_rotary_factor"]
    covered = max(seq_len, native)
    if options.type == "dynamic":
        parameters["rope_theta"] = ntk_theta(
            theta, _rotary_dim(config, parameters), native, covered, options.factor or 1.0
        )
    else:
        if options.factor is not None:
            covered = stretched(native, options.factor)
        if seq_len > covered:
            raise UserError(
                f"model.rope.factor={options.factor:g} stretches {native} positions to {covered}, less than the "
                f"training length {seq_len}; set it to at least {_shortest_factor(seq_len, native)}."
            )
        parameters |= {"rope_type": options.type, "factor": float(options.factor or covered / native)}
    if options.type == "yarn":
        parameters["original_max_position_embeddings"] = native
        kept = {name: present[name] for name in _YARN if again and present.get(name) is not None}
        parameters |= _yarn_options(options, kept)
    _replace(config, kind, parameters)
    config.max_position_embeddings = covered
    logger.info("rope: %s from %d to %d positions: %s", options.type, native, covered, parameters)


def _yarn_options(options: RopeOptions, kept: dict[str, Any]) -> dict[str, Any]:
    """A model's own YaRN settings under those that are asked for; what transformers would pass over is refused."""
    asked = {name: getattr(options, name) for name in _YARN if getattr(options, name) is not None}
    scales = [name for name in ("mscale", "mscale_all_dim") if name in asked]
    if scales and "attention_factor" in asked:
        raise UserError(
            f"model.rope.{scales[0]} has no effect beside model.rope.attention_factor; remove one of them."
        )
    if scales:
        kept = {name: value for name, value in kept.items() if name != "attention_factor"}
    merged = {**kept, **asked}
    if scales and not {"mscale", "mscale_all_dim"} <= merged.keys():
        raise UserError(
            f"model.rope.{scales[0]} has no effect alone; set both mscale and mscale_all_dim, or attention_factor."
        )
    return merged


def stretched(native: int, factor: float) -> int:
    """``native`` positions times ``factor``, whole positions only.

    Exact: 1.15 is taken as 115/100 and not as the float below it. A factor that is the float of a ratio of two lengths
    gives the length again.
    """
    exact = Fraction(repr(float(factor))) * native
    nearest = round(exact)
    return nearest if abs(exact - nearest) <= Fraction(nearest, 2**50) else math.floor(exact)


def ntk_theta(theta: float, dim: int, native: int, seq_len: int, factor: float = 1.0) -> float:
    """The NTK-aware base at length L = ``seq_len``: theta * (factor * L / native - (factor - 1)) ** (d / (d - 2)).

    With factor 1 the slowest frequency is stretched by exactly L / native, as linear interpolation would, and the
    fastest is left as it is.
    """
    return float(theta * (factor * seq_len / native - (factor - 1)) ** (dim / (dim - 2)))


def _rotary_dim(config: Any, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _shortest_factor(seq_len: int, native: int) -> str:
    """seq_len / native, rounded up to two decimals."""
    hundredths = -(-seq_len * 100 // native)
    return f"{hundredths // 100}.{hundredths % 100:02d}".rstrip("0").rstrip(".")
