"""Three training steps in a process of their own, whose GPU memory is limited to what `recompute: auto` was told.

Reads options as JSON from its only argument and prints one line of JSON. The allocator must be set before CUDA starts,
which is why this is no function of a test.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from mtraining import use_expandable_segments
from mtraining.bench.train.cases import Shape, TrainCase
from mtraining.bench.train.model import batches, build_model, parallel, process_for, random_sequences, stepper
from mtraining.layout import build_layout
from mtraining.predict.memory import OUTSIDE, Traces, Workload, predict
from mtraining.predict.recompute import Room, choose_policies, policies_text

# A layer keeps 3 GiB at most and 0.13 at least.
SHAPE = Shape("auto", 8, 1024, 5504, 8, 2, 32_000, 32_768)
SEQ_LEN = 65_536


def main(
    share: float, fused: str, offload: bool, device: torch.device, shape: Shape, seq_len: int
) -> dict[str, Any]:
    """
    Args:
        share: of the memory between what full recompute needs and what keeping everything needs.
    """
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    case = TrainCase(
        shape, seq_len, 0.1, "striped", "flat", "auto", shape.layers, fused=fused, offload=offload
    )
    work = Workload(
        build_model(shape, seq_len, shape.layers, torch.device("meta")),
        world=1,
        ring=(1, 1),
        seq_len=seq_len,
        batch=1,
        accumulation=1,
        patterns=[case.pattern()],
        layout=build_layout("striped", shape.block_size),
        recompute="full",
        offload=offload,
        fused=fused,
        compute=torch.bfloat16,
    )
    traces = Traces(work)
    least, most = (
        predict(replace(work, recompute=way, offload=False), traces).wanted for way in ("full", "none")
    )
    room = Room.of(least + share * (most - least))
    choice = choose_policies(work, room, None, traces)
    process = process_for(case, device, 0, 1)
    if device.type == "cuda":
        # What is beside PyTorch does not count against the limit.
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((room.memory - OUTSIDE) / total, device)
    chosen = replace(case, policies=choice.policies)
    model = parallel(chosen, build_model(shape, seq_len, shape.layers, device), process)
    step, data = (
        stepper(chosen, model, process),
        batches(case, random_sequences(shape.vocab, seq_len), process),
    )
    losses = [step.run(data, number).loss for number in range(3)]
    dist.destroy_process_group()
    return {
        "losses": losses,
        "policies": policies_text(choice.policies),
        "kinds": len(set(choice.policies)),
        "predicted": choice.prediction.peak,
        "measured": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


if __name__ == "__main__":
    use_expandable_segments()
    torch.cuda.set_device(0)
    print(
        json.dumps(
            main(**json.loads(sys.argv[1]), device=torch.device("cuda", 0), shape=SHAPE, seq_len=SEQ_LEN)
        )
    )
