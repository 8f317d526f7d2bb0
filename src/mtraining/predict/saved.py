"""Attention as a saved run measured it: uneven indices for the simulated ring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model.support import head_dim_of
from mtraining.predict.work import Index, LayerWork
from mtraining.ring.topology import ring_offset


def saved_works(
    run: Path, hf_model: Any, seq_len: int, columns: int
) -> dict[tuple[str, int, int], LayerWork]:
    """What the ranks of a run's rings compute in a layer, by (layout, ranks, outer), from its ``balance.json``.

    Args:
        columns: of each head; the run does not save which they were.

    Raises:
        UserError: no such run, or one of another length or number of heads.
    """
    try:
        balance = json.loads((run / "balance.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"--run: {run} has no balance.json and config.yaml that can be read ({error}); give the folder of a run "
            "that logged a step."
        ) from None
    if config["train"]["seq_len"] != seq_len:
        raise UserError(
            f"--run: {run} trained on {config['train']['seq_len']} tokens a sequence, not {seq_len}; use its --seq-len."
        )
    block, batch = config["pattern"]["block_size"], config["train"]["micro_batch_size"]
    model, cp, outer = hf_model.config, config["parallel"]["cp"], config["parallel"]["cp_outer"]
    works = {}
    for entry in balance["layouts"]:
        world, name = entry["world"], entry["layout"]
        rings = outer if world == cp else 1
        layout = build_layout(name, block)
        load = torch.tensor(entry["load"], dtype=torch.float64) / batch
        order = torch.tensor([ring_offset(a, b, rings) for a in range(rings) for b in range(world // rings)])
        sources = (torch.arange(world)[:, None] - order) % world
        tiles = torch.zeros(world, world, dtype=torch.float64).scatter_(1, sources, load)
        index = Index.no_tiles(seq_len, block, columns)
        works[name, world, 1] = works[name, world, rings] = LayerWork.of(
            index,
            layout,
            world,
            model.num_attention_heads,
            model.num_key_value_heads,
            head_dim_of(model),
            tiles,
        )
    return works
