"""Prompts, jobs of a process pool, and transformers' own answers, for tests of generation."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import BLOCK, DENSE, SPARSE, VOCAB, tiny_model
from torch import Tensor

from distributed import Worker
from mtraining.generate import Generation, Generator
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.pattern import Pattern, build_pattern

LENGTHS = (29, 5, 50)  # none a multiple of a block; the shortest leaves ranks without a token
NEW = 8
QUERIES_AND_KEYS = re.compile(r"\b(q_proj|k_proj|qkv_proj|kv_proj|query_key_value)\.weight")  # large already
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "cp1": ((1,), ("cp",)),
    "cp2": ((2,), ("cp",)),
    "cp4": ((4,), ("cp",)),
    "cp2x2": ((2, 2), ("cp_outer", "cp_inner")),
}


def world_of(mesh: str) -> int:
    return int(torch.tensor(MESHES[mesh][0]).prod())


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def lively_model(family: str, dtype: str | None = None) -> Any:
    """A tiny model whose layers weigh enough beside its embeddings that it does not repeat one token."""
    model = tiny_model(family, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim >= 2 and not QUERIES_AND_KEYS.search(name):
                parameter.mul_(4)
    return model


def generator_for(
    worker: Worker | None, family: str, mesh: str = "cp1", pattern: Pattern | None = None, layout: str = "striped",
    fsdp: bool = False, **options: Any,
) -> Generator:  # fmt: skip
    """Over a pool's ranks, or alone; whole weights on each, or FSDP's shards."""
    grid = None if worker is None else worker.mesh(*MESHES[mesh])
    pattern, dealt = pattern or build_pattern(**DENSE), build_layout(layout, BLOCK)
    if fsdp:
        parallel = parallelize(lively_model(family), grid, pattern=build_pattern(**SPARSE), layout=dealt)
        return Generator(parallel, pattern=pattern, **options)
    return Generator(lively_model(family), mesh=grid, pattern=pattern, layout=dealt, **options)


def answers(worker: Worker, **options: Any) -> list[Generation]:
    """Job: greedy answers to the prompts."""
    return generator_for(worker, **options).generate(prompts(), NEW, eos=(), keep_logits=True)


@functools.cache
def transformers_answers(family: str) -> list[tuple[list[int], Tensor]]:
    """New tokens and their logits, by `generate` of transformers on one process, prompt by prompt."""
    model, found = lively_model(family), []
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        found.append((out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits)[:, 0]))
    return found
