"""Low-rank adapters (LoRA, arXiv 2106.09685) as a run's options ask for them, made by peft."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from mtraining.errors import UserError, did_you_mean, first_line
from mtraining.model.adapters import transformers_names_allowed
from mtraining.model.options import ALL_LINEAR, LoraOptions


def require_peft(options: LoraOptions) -> None:
    """Refuse adapters where peft is not installed."""
    if options.r and importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs the package peft; run: pip install 'mtraining[lora]'.")


def add_lora(hf_model: Any, options: LoraOptions, seed: int, base: str | None = None) -> Any:
    """The ``PeftModel`` of a transformers model, changed in place: its weights are frozen but for those asked for.

    What is trained is fp32 where the model's weights are coarser, as in peft: a small update of a bf16 weight is lost.

    Args:
        hf_model: on a CPU, or on the meta device.
        seed: of the adapters' weights; the same on every rank whatever was drawn before.
        base: the name or folder of the weights, for the adapter's folder.

    Raises:
        UserError: peft is missing, or a name fits no module of the model.
    """
    require_peft(options)
    whole = _whole_modules(hf_model, options)
    _check_targets(hf_model, options, whole)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha or 2 * options.r,
        target_modules=options.targets if isinstance(options.targets, str) else list(options.targets),
        modules_to_save=whole or None,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        task_type="CAUSAL_LM",
        ensure_weight_tying=_is_tied(hf_model) and hf_model.get_input_embeddings() in _named(hf_model, whole),
    )
    with torch.random.fork_rng(devices=[]), transformers_names_allowed():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(hf_model, config)
        except ValueError as error:
            raise UserError(f"model.lora: peft refuses these options ({first_line(error)}).") from error
    model.peft_config[model.active_adapter].base_model_name_or_path = base
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return model


def _is_tied(hf_model: Any) -> bool:
    head = hf_model.get_output_embeddings()
    return head is not None and head.weight is hf_model.get_input_embeddings().weight


def _named(hf_model: Any, ends: list[str]) -> list[nn.Module]:
    """The modules whose names end so, as peft finds those that are trained whole."""
    return [module for name, module in hf_model.named_modules() if name.endswith(tuple(ends))] if ends else []


def _whole_modules(hf_model: Any, options: LoraOptions) -> list[str]:
    """``also_train`` as peft takes it. A tied head is trained with the embeddings, whichever of the two is named."""
    names = {name: module for name, module in hf_model.named_modules() if name}
    head, embeddings = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    found = []
    for end in options.also_train:
        modules = [module for name, module in names.items() if name.endswith(end)]
        if not any(True for module in modules for _ in module.parameters()):
            ends = {name.rpartition(".")[2] for name, module in names.items() if [*module.parameters(False)]}
            raise UserError(
                f"model.lora.also_train: no module with weights has a name that ends with {end!r}"
                f"{did_you_mean(end, ends)}; the model has {', '.join(sorted(ends))}."
            )
        if any(module is head for module in modules) and _is_tied(hf_model):
            end = next(name for name, module in names.items() if module is embeddings)
        found.append(end)
    return list(dict.fromkeys(found))


def _check_targets(hf_model: Any, options: LoraOptions, whole: list[str]) -> None:
    if options.targets == ALL_LINEAR:
        return
    head = hf_model.get_output_embeddings()
    linear = {name: module for name, module in hf_model.named_modules() if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name, module in linear.items() if module is not head}
    trained_whole = _named(hf_model, whole)
    for target in options.targets:
        modules = [module for name, module in linear.items() if f".{name}".endswith(f".{target}")]
        if not modules or any(module is head for module in modules):
            why = "is the head, which is trained whole or not at all" if modules else "is no linear layer"
            raise UserError(
                f"model.lora.targets: {target!r} {why}{did_you_mean(target, known)}; the model has "
                f"{', '.join(sorted(known))}."
            )
        if any(module is other for module in modules for other in trained_whole):
            raise UserError(
                f"model.lora: {target!r} is in targets and trained whole by also_train; leave it out of one of them."
            )
