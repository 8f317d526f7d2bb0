"""TRL's SFTTrainer whose processes share sequences: torchrun --nproc-per-node 2 examples/trl_sft.py

`ContextParallelTrainer` stands before `SFTTrainer` among the bases; the rest is a script of TRL, LoRA included.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from mtraining.integrations import ContextParallelConfig, ContextParallelTrainer


class ContextParallelSFTTrainer(ContextParallelTrainer, SFTTrainer):
    """Supervised fine-tuning on shared sequences."""


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a Hugging Face folder or hub id; without it a tiny random model")
parser.add_argument("--tokenizer", required=True, help="a folder or hub id; that of the model")
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--pattern", default="vertical_slash")
parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
parser.add_argument("--out", default="runs/trl_sft")
options = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads))

# Prompts are not learned, only what follows them.
rows = [
    {"prompt": " ".join(map(str, range(number))), "completion": " " + str(number) * (40 + number)}
    for number in range(20, 28)
]

arguments = SFTConfig(
    output_dir=options.out,
    max_steps=options.steps,
    max_length=options.max_length,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    report_to="none",
)
trainer = ContextParallelSFTTrainer(
    model,
    arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear") if options.lora else None,
    context_parallel=ContextParallelConfig(pattern=options.pattern),
)
trainer.train()
trainer.save_model()
