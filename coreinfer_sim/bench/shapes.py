"""Shapes: real architectures to be filled with random weights, to measure speed without a checkpoint.

The numbers are those of the models' own ``config.json``. Scaled positions are left out, as they change no speed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from coreinfer_sim.base.errors import ConfigError


def _llama_like(
    d_model: int, d_ff: int, n_layers: int, n_heads: int, n_kv_heads: int, vocab: int, tied: bool = False, **more: Any
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "hidden_size": d_model,
            "intermediate_size": d_ff,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads,
            "head_dim": d_model // n_heads,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32768,
            **more,
        }
    )


def _opt(d_model: int, n_layers: int, n_heads: int) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "hidden_size": d_model,
            "word_embed_proj_dim": d_model,
            "ffn_dim": 4 * d_model,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        }
    )


_SHAPES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "exaone-4.0-1.2b": ("Exaone4Config", _llama_like(2048, 4096, 30, 32, 8, 102400, tied=True)),
    "gemma-3-1b": (
        "Gemma3TextConfig",
        _llama_like(
            1152, 6912, 26, 4, 1, 262144, tied=True, head_dim=256, query_pre_attn_scalar=256, sliding_window=512
        ),
    ),
    "gpt2": (
        "GPT2Config",
        MappingProxyType(
            {"n_embd": 768, "num_hidden_layers": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
        ),
    ),
    "llama-3.1-8b": ("LlamaConfig", _llama_like(4096, 14336, 32, 32, 8, 128256)),
    "llama-3.2-1b": ("LlamaConfig", _llama_like(2048, 8192, 16, 32, 8, 128256, tied=True)),
    "mistral-7b": ("MistralConfig", _llama_like(4096, 14336, 32, 32, 8, 32768, sliding_window=None)),
    "olmo-2-1b": ("Olmo2Config", _llama_like(2048, 8192, 16, 16, 16, 100352)),
    "opt-1.3b": ("OPTConfig", _opt(2048, 24, 32)),
    "opt-125m": ("OPTConfig", _opt(768, 12, 12)),
    "opt-6.7b": ("OPTConfig", _opt(4096, 32, 32)),
    "phi-1.5": ("PhiConfig", _llama_like(2048, 8192, 24, 32, 32, 51200)),
    "pythia-1b": ("GPTNeoXConfig", _llama_like(2048, 8192, 16, 8, 8, 50304)),
    "qwen2.5-1.5b": ("Qwen2Config", _llama_like(1536, 8960, 28, 12, 2, 151936, tied=True)),
    "qwen2.5-7b": ("Qwen2Config", _llama_like(3584, 18944, 28, 28, 4, 152064)),
    "qwen3-1.7b": ("Qwen3Config", _llama_like(2048, 6144, 28, 16, 8, 151936, tied=True)),
    "smollm2-135m": ("LlamaConfig", _llama_like(576, 1536, 30, 9, 3, 49152, tied=True)),
    "stablelm-2-1.6b": ("StableLmConfig", _llama_like(2048, 5632, 24, 32, 32, 100352, use_qkv_bias=True)),
}
SHAPES = tuple(_SHAPES)


@dataclass(frozen=True)
class Shape:
    """A real architecture, perhaps with fewer layers."""

    name: str
    n_layers: int
    """Layers that are made."""
    n_layers_of_model: int
    """Layers of the real model."""

    @property
    def title(self) -> str:
        """What results call it."""
        cut = "" if self.n_layers == self.n_layers_of_model else f"{self.n_layers} of {self.n_layers_of_model} layers, "
        return f"{self.name} ({cut}random weights)"

    def config(self) -> Any:
        """Return the transformers configuration; it names no token that ends a text."""
        import transformers

        kind, numbers = _SHAPES[self.name]
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return getattr(transformers, kind)(**{**numbers, "num_hidden_layers": self.n_layers, **ends})


def parse_shape(text: str) -> Shape:
    """Read a shape such as ``llama-3.1-8b`` or ``llama-3.1-8b:layers=4``.

    Raises:
        ConfigError: there is no such shape, or it has not that many layers.
    """
    found = re.fullmatch(r"([^:]+)(?::layers=(\d+))?", text.strip())
    if found is None or found[1] not in _SHAPES:
        raise ConfigError(f"the shape is {text!r}, expected one of {', '.join(SHAPES)}, perhaps with ':layers=N'.")
    whole = _SHAPES[found[1]][1]["num_hidden_layers"]
    n_layers = whole if found[2] is None else int(found[2])
    if not 1 <= n_layers <= whole:
        raise ConfigError(f"{n_layers} layers of {found[1]} were requested, expected 1 to {whole}.")
    return Shape(found[1], n_layers, whole)


def random_model(shape: Shape, dtype: str = "auto", device: str = "auto") -> Any:
    """Make a `LanguageModel` of a shape, with the same random weights each time and a tokenizer of bytes.

    Args:
        shape: of the model.
        dtype: as in `load_model`; auto and stored: bfloat16, or auto float32 where the CPU lacks that.
        device: as in `load_model`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from coreinfer_sim.models.loading import DTYPES, LanguageModel, usable
    from coreinfer_sim.models.mlps import find_mlps

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = torch.bfloat16
    wanted = DTYPES.get(dtype, stored if dtype == "stored" else usable(stored, device))
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=wanted)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(1 << 20, generator=generator)).to(stored).to(wanted)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            _fill(parameter, block.roll(number))
    return LanguageModel(model.to(device).eval(), byte_tokenizer(), shape.title, find_mlps(model))


def _fill(parameter: Any, block: Any) -> None:
    """Fill a matrix with one random block after the other; drawing billions of numbers would need minutes."""
    if parameter.dim() == 1:
        parameter.fill_(1.0)
        return
    flat = parameter.view(-1)
    for begin in range(0, len(flat), len(block)):
        part = flat[begin : begin + len(block)]
        part.copy_(block[: len(part)])


def byte_tokenizer() -> Any:
    """Make a tokenizer whose tokens are bytes, so that a text without double spaces has a known number of tokens.

    Double spaces are joined because llama.cpp wants one merge at least.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"
    vocabulary = {token: number for number, token in enumerate([*alphabet, 2 * space])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(space, space)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
