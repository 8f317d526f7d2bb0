"""Low-rank adapters of peft inside a transformers model: which are accepted, and what their folder holds.

peft surrounds each adapted linear layer with a layer of its own. A module that is trained whole gets a wrapper with two
copies, one frozen. Here the trained copy takes the module's place. Embeddings, norms and head are then what they are
in a model without adapters, a tied head stays tied, and nothing is gathered twice.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mtraining.errors import UserError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft's names of tensors begin with."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model.

    Attributes:
        name: what peft calls it among the names of parameters.
        config: peft's ``LoraConfig``.
    """

    name: str
    config: Any

    def save(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write a folder that ``peft.PeftModel.from_pretrained`` reads.

        Args:
            state: the trained tensors, whole, by their names in the transformers model, tied ones under each name.
            folder: exists or is made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Copies: the file has embeddings and a tied head under both names, as peft looks for them.
        tensors = {PREFIX + self._saved_name(name): tensor.clone() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def _saved_name(self, name: str) -> str:
        """Without the adapter's own name, which stands behind those of its two matrices."""
        parts = name.split(".")
        return ".".join(
            part
            for index, part in enumerate(parts)
            if not (part == self.name and index and parts[index - 1].startswith("lora_"))
        )


def open_adapter(model: Any) -> tuple[Any, Adapter | None]:
    """The transformers model inside a ``PeftModel``, with its adapter layers; another model is returned as it is.

    Modules that are trained whole stand in their wrappers' place afterwards, in ``model`` too.

    Raises:
        UserError: an adapter that is no single LoRA, or one that would be computed or saved wrongly.
    """
    # A PeftModel exists only where peft has been imported.
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model, None
    if len(model.peft_config) > 1:
        raise UserError(
            f"model: it has the adapters {', '.join(model.peft_config)}; keep one, and remove the others by "
            "delete_adapter."
        )
    name, config = next(iter(model.peft_config.items()))
    _refuse_config(config, name)
    hf_model = model.get_base_model()
    _refuse_layers(hf_model)
    _open_wrappers(hf_model, name)
    return hf_model, Adapter(name, config)


def trained(module: nn.Module, tied: bool = False) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; tied ones once, or under each of their names."""
    named = module.named_parameters(remove_duplicate=not tied)
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def without_frozen(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state dict of ``module`` has beside frozen parameters."""
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name: value for name, value in state.items() if name not in frozen}


def adapted_like(model: Any, other: Any) -> Any:
    """``model``, changed in place, with an adapter of the same kind as ``other`` has, if it has one."""
    configs = getattr(other, "peft_config", None)
    if not configs:
        return model
    from peft import get_peft_model

    config = copy.deepcopy(next(iter(configs.values())))
    config.base_model_name_or_path = None  # peft would warn that this model has no name
    with transformers_names_allowed():
        return open_adapter(get_peft_model(model, config))[0]


@contextmanager
def transformers_names_allowed() -> Iterator[None]:
    """Around peft's changes of a model: it asks transformers by a name that transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _refuse_config(config: Any, name: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UserError(f"model: its adapter {name!r} is of peft's kind {kind}; only LoRA is supported.")
    if config.bias != "none":
        raise UserError(
            f"model: its adapter {name!r} trains biases too (bias={config.bias!r}); use bias='none'."
        )
    if getattr(config, "trainable_token_indices", None):
        raise UserError(
            f"model: its adapter {name!r} trains single words (trainable_token_indices); name the embeddings in "
            "modules_to_save instead, which trains them whole."
        )


def _refuse_layers(hf_model: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if getattr(hf_model.config, "quantization_config", None):
        raise UserError(
            "model: the weights under its adapter are quantized, which cannot be sharded; load them unquantized."
        )
    for what, module in (
        ("input embeddings", hf_model.get_input_embeddings()),
        ("lm_head", hf_model.get_output_embeddings()),
    ):
        if isinstance(module, BaseTunerLayer):
            raise UserError(
                f"model: its {what} have a low-rank adapter, which the chunked loss does not add; train them whole "
                "(modules_to_save), or leave them out of target_modules."
            )
    for name, module in hf_model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise UserError(
                f"model: the adapter of {name} is merged into its weight; call unmerge_adapter() before parallelize."
            )


def _open_wrappers(hf_model: Any, name: str) -> None:
    """Put the trained parameters of every wrapper into its original module, and that in the wrapper's place."""
    from peft.utils.other import ModulesToSaveWrapper

    for path, wrapper in list(hf_model.named_modules()):
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        module = wrapper.original_module
        for key, parameter in list(wrapper.modules_to_save[name].named_parameters()):
            owner, _, own = key.rpartition(".")
            module.get_submodule(owner).register_parameter(own, parameter)
        parent, _, own = path.rpartition(".")
        setattr(hf_model.get_submodule(parent), own, module)
