"""Tiny models of several types as GGUF files, written as llama.cpp's own script writes them."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import transformers
from lean_types import SMALL
from tiny_models import model_of, tiny_tokenizer

from coreinfer_sim.export.gguf import _add_tokenizer, _interleaved

_SIZES = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256, "sliding_window": 32}
GGUF_TYPES = {
    "llama": ("LlamaConfig", "llama", {}),
    "qwen3": ("Qwen3Config", "qwen3", {"head_dim": 128}),
    "gemma2": ("Gemma2Config", "gemma2", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3TextConfig", "gemma3", {"head_dim": 16}),
    "nemotron": ("NemotronConfig", "nemotron", {"head_dim": 16}),
    "phi3": ("Phi3Config", "phi3", {}),
    "stablelm": ("StableLmConfig", "stablelm", {"use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", "starcoder2", {}),
}
"""By model type: its configuration class, what a file calls it, and its settings."""
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
"""Rows fill the blocks of 256 that the types of llama.cpp's K have."""
_FROM_ONE = ("gemma2", "gemma3", "nemotron")


def by_ggml(_name, values, kind):
    return gguf.quants.quantize(values, kind)


def write_gguf(path, model_type, kind="Q8_0", quantised=by_ggml, **more):
    """Write a model of random weights; ``quantised`` turns a matrix into blocks of ggml's type ``kind``."""
    config_class, architecture, settings = GGUF_TYPES[model_type]
    tokenizer = tiny_tokenizer()
    config = getattr(transformers, config_class)(**{**_SIZES, "vocab_size": len(tokenizer), **settings, **more})
    model, kind = model_of(config), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_sliding_window(config.sliding_window or 0)
    _add_tokenizer(writer, SimpleNamespace(tokenizer=tokenizer, model=model))
    names = gguf.get_tensor_name_map(
        next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():
        of_file, value = names.get_name(name, try_suffixes=(".weight", ".bias")), parameter.detach()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = _interleaved(
                value, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            )
        if architecture in _FROM_ONE and of_file.endswith("norm.weight"):
            value = value + 1
        array = np.ascontiguousarray(value.numpy())
        if array.ndim == 2:
            writer.add_tensor(of_file, quantised(of_file, array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(of_file, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
