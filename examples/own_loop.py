"""A training loop of one's own on sequences that processes share: torchrun --nproc-per-node 2 examples/own_loop.py

Every process runs this file. Each holds a part of every sequence and a part of the parameters.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from mtraining.layout import build_layout
from mtraining.model import export_model, parallelize
from mtraining.ring import Ring

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a Hugging Face folder or hub id; without it a tiny random model")
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--pattern", default="vertical_slash")
parser.add_argument("--out", help="where to write the trained model")
options = parser.parse_args()

# A process for each GPU, or processes of the CPU.
kind = "cuda" if torch.cuda.is_available() else "cpu"
if kind == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("cp",))
rank, world = Ring.over(mesh).rank, mesh.size()

torch.manual_seed(0)  # the same weights and the same data on every process
if options.model:
    hf_model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads))
layout, dtype = build_layout("striped"), torch.bfloat16 if kind == "cuda" else None
model = parallelize(hf_model, mesh, pattern=options.pattern, layout=layout, param_dtype=dtype)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(options.steps):
    # The whole sequence. Labels are shifted: each token's is its successor.
    tokens = torch.randint(hf_model.config.vocab_size, (1, options.seq_len + 1))
    whole = (tokens[:, :-1], torch.arange(options.seq_len)[None], tokens[:, 1:])
    ids, positions, labels = (layout.shard(part, rank, world).to(kind) for part in whole)
    # Shares of the mean loss add up to it; after backward each process has its part of the mean's gradient.
    share = model(ids, positions, labels, num_labels=options.seq_len)
    share.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(share.detach())
    if rank == 0:
        print(f"step {step + 1} loss {share.item():.6f}", flush=True)
if options.out:
    export_model(model, options.out)
dist.destroy_process_group()
