"""When FSDP gathers the parameters of the next layer: what the benchmark of training steps compares."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

from torch.distributed.fsdp import FSDPModule

from mtraining.model.parallel import ParallelLM
from mtraining.model.support import layers_of


def prefetch_gathers(model: ParallelLM) -> None:
    """Have each layer's forward ask for the next layer's parameters before its own work is launched.

    Without this, FSDP asks when the host comes to the next layer. The gather then stands behind all transfers of the
    layer's ring where both share a communicator. Backward already asks one layer ahead, as FSDP2 does by default. At
    most two layers are whole at a time either way. A model without FSDP is left alone.
    """
    if not isinstance(model, FSDPModule):
        return
    embeddings = model.hf_model.get_input_embeddings()
    units: list[Any] = [model, *([embeddings] if isinstance(embeddings, FSDPModule) else [])]
    for unit, following in pairwise([*units, *layers_of(model.hf_model)]):
        cast(FSDPModule, unit).set_modules_to_forward_prefetch([following])
