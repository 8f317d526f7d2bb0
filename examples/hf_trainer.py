"""A Trainer script whose processes share sequences: torchrun --nproc-per-node 2 examples/hf_trainer.py

Two lines differ from a script of plain Trainer: the class, and `context_parallel`.
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a Hugging Face folder or hub id; without it a tiny random model")
parser.add_argument("--seq-len", type=int, default=512)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--pattern", default="vertical_slash")
parser.add_argument("--out", default="runs/hf_trainer")
options = parser.parse_args()

set_seed(0)
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads))

# Any dataset and collator of a Trainer script.
tokens = torch.randint(model.config.vocab_size, (8, options.seq_len)).tolist()
dataset = [{"input_ids": row, "labels": row} for row in tokens]

arguments = TrainingArguments(
    output_dir=options.out,
    max_steps=options.steps,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    activation_checkpointing=True,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    report_to="none",
)
trainer = ContextParallelTrainer(
    model, arguments, train_dataset=dataset, context_parallel=ContextParallelConfig(pattern=options.pattern)
)
trainer.train()
trainer.save_model()
