"""Chat templates of the families that users have, a tokenizer for all of them, and rows.

Each template is written here in the style of its family. `MARKED` ones say by `{% generation %}` what the assistant
says; their plain twins render the same text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <s> </s> "
    "[INST] [/INST]"
).split()
# How Llama-3 and Qwen2.5 cut text into words: line breaks stay together, whatever follows.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = (
    "What is the weather in Paris today? The weather in Paris is sunny and warm, with 21 degrees.\n\nYes\n\n"
    * 3
)

# As SmolLM2's and Qwen2.5's, with tools. The byte tokenizer has its special tokens.
CHATML_MARKED = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}<|im_end|>
{% elif messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ '\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endgeneration %}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\n<result>' + message.content + '</result><|im_end|>\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3_MARKED = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# As Qwen3's: what was thought is shown of the last turn only, so earlier turns change once another question comes.
THINKING = """
{%- set ns = namespace(question=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.index0 > ns.question %}
{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As Mistral's: no words ask for an answer, roles must alternate, and the system message stands in the last question.
MISTRAL = """
{%- if messages[0].role == 'system' %}{% set system, talk = messages[0].content + '\n\n', messages[1:] %}
{%- else %}{% set system, talk = '', messages %}{% endif %}
{{- bos_token }}
{%- for message in talk %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}
{%- set last = loop.index0 + 2 >= talk | length %}
{{- '[INST] ' + (system if last else '') + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""


def unmarked(template: str) -> str:
    """The same template without its marks."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


TEMPLATES = {
    "chatml": unmarked(CHATML_MARKED),
    "chatml marked": CHATML_MARKED,
    "llama3": unmarked(LLAMA3_MARKED),
    "llama3 marked": LLAMA3_MARKED,
    "mistral": MISTRAL,
    "thinking": THINKING,
}


@cache
def _trained() -> str:
    """Byte-level BPE with merges, as JSON; its offsets leave out leading spaces, as those of GPT-2 and Llama-3 do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return str(tokenizer.to_str())


def chat_tokenizer(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the special tokens of every template here."""
    bos = "<|begin_of_text|>" if template in (LLAMA3_MARKED, unmarked(LLAMA3_MARKED)) else "<s>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token=bos, eos_token="</s>", **options
    )
    made.chat_template = template
    return made


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK, SAY = turn("user", "What is the weather?"), turn("assistant", "It is sunny.\n\n  Warm, too. ")
MORE, END = turn("user", " In Paris? "), turn("assistant", "Yes: 21 degrees. 🌞")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Paris"}}}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [ASK, SAY]},
    "two turns": {"messages": [ASK, SAY, MORE, END]},
    "a system message": {"messages": [turn("system", "Be brief."), ASK, SAY, MORE, END]},
    "an open end": {"messages": [ASK, SAY, MORE]},
    "tools": {
        "messages": [ASK, turn("assistant", "", tool_calls=[CALL]), turn("tool", "sunny"), END],
        "tools": [TOOL],
    },
    "tools and a system message": {
        "messages": [turn("system", "Be brief."), ASK, turn("assistant", "Let me see.", tool_calls=[CALL]),
                     turn("tool", ""), END],
        "tools": [TOOL],
    },
}  # fmt: skip
