"""Tiny models with random weights, one of each layout and a few that are refused, and a tiny checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 80
N_LAYERS = 3
CONTEXT = 128
INIT = 0.2
"""Wide enough that the MLPs matter beside the residual stream, so that dropped neurons change the tokens."""


@dataclass(frozen=True)
class TinyFamily:
    """How to build one family's tiny model, and what its MLPs should be found to be."""

    key: str
    """Readable id of the test."""
    family: str
    """The type of its text part's configuration."""
    config: Callable[[], Any]
    d_model: int = 32
    d_ff: int = 48
    gated: bool = False
    biases: bool = False
    """Whether the MLP's projections have biases."""


def _special_ids(**other: Any) -> dict[str, Any]:
    """Token ids that lie in the vocabulary, no end that stops random tokens, and a head of its own.

    A head tied to the embeddings would mostly repeat the last token.
    """
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return {"vocab_size": VOCABULARY, **ids, "tie_word_embeddings": False, **other}


def _llama_like(name: str, **other: Any) -> Callable[[], Any]:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "initializer_range": INIT,
        **_special_ids(),
        **other,
    }
    return lambda: getattr(transformers, name)(**settings)


def _without_head_dim(name: str, **other: Any) -> Callable[[], Any]:
    """For families that derive the width of a head, and would only store the name."""
    config = _llama_like(name, **other)

    def build() -> Any:
        made = config()
        made.__dict__.pop("head_dim", None)
        return made

    return build


def _opt() -> Any:
    return transformers.OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        init_std=INIT,
        **_special_ids(),
    )


def _gpt2() -> Any:
    return transformers.GPT2Config(
        n_embd=32,
        n_inner=72,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=INIT,
        **_special_ids(),
    )


def _gpt_neox() -> Any:
    return transformers.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT,
        **_special_ids(),
    )


def _falcon() -> Any:
    return transformers.FalconConfig(
        hidden_size=32,
        ffn_hidden_size=80,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=True,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT,
        **_special_ids(),
    )


def _bloom() -> Any:
    return transformers.BloomConfig(
        hidden_size=24, n_layer=N_LAYERS, n_head=4, initializer_range=INIT, **_special_ids()
    )


TINY_FAMILIES = (
    TinyFamily("llama", "llama", _llama_like("LlamaConfig"), gated=True),
    TinyFamily(
        "llama-relu-bias",
        "llama",
        _llama_like("LlamaConfig", hidden_act="relu", mlp_bias=True, attention_bias=True, intermediate_size=64),
        d_ff=64,
        gated=True,
        biases=True,
    ),
    TinyFamily("mistral", "mistral", _llama_like("MistralConfig", sliding_window=6), gated=True),
    TinyFamily("qwen2", "qwen2", _without_head_dim("Qwen2Config"), gated=True),
    TinyFamily("qwen3", "qwen3", _llama_like("Qwen3Config"), gated=True),
    TinyFamily("gemma", "gemma", _llama_like("GemmaConfig"), gated=True),
    TinyFamily("gemma2", "gemma2", _llama_like("Gemma2Config", sliding_window=6, query_pre_attn_scalar=8), gated=True),
    TinyFamily(
        "gemma3",
        "gemma3_text",
        _llama_like(
            "Gemma3TextConfig",
            sliding_window=6,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        gated=True,
    ),
    TinyFamily("phi3", "phi3", _without_head_dim("Phi3Config"), gated=True),
    TinyFamily("olmo2", "olmo2", _without_head_dim("Olmo2Config"), gated=True),
    TinyFamily("opt", "opt", _opt, d_ff=64, biases=True),
    TinyFamily("gpt2", "gpt2", _gpt2, d_ff=72, biases=True),
    TinyFamily("gpt-neox", "gpt_neox", _gpt_neox, d_ff=64, biases=True),
    TinyFamily("falcon", "falcon", _falcon, d_ff=80, biases=True),
    TinyFamily("bloom", "bloom", _bloom, d_model=24, d_ff=96, biases=True),
    TinyFamily("phi2", "phi", _without_head_dim("PhiConfig"), biases=True),
    TinyFamily("starcoder2", "starcoder2", _without_head_dim("Starcoder2Config"), biases=True),
)
BY_KEY = {tiny.key: tiny for tiny in TINY_FAMILIES}
STRUCTURES = ("llama", "gemma2", "phi3", "opt", "gpt-neox")
"""Of the families, one of each kind of layer: gated, normed behind the MLP, fused, plain with biases, parallel to attention."""


def _from_config(auto_class: Any, config: Any, seed: int) -> Any:
    """Build a model whose every weight is random: also biases and norms, which start as zeros and ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def model_of(config: Any, seed: int = 0) -> Any:
    """Build a causal model of a configuration with random weights, float32, never ending by itself."""
    return _from_config(transformers.AutoModelForCausalLM, config, seed)


def tiny_model(key: str, seed: int = 0) -> Any:
    """Build the tiny model of one of `TINY_FAMILIES`, float32, never ending by itself."""
    return _from_config(transformers.AutoModelForCausalLM, BY_KEY[key].config(), seed)


def tiny_mixtral() -> Any:
    """Build a mixture of experts."""
    config = _llama_like("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)()
    return _from_config(transformers.AutoModelForCausalLM, config, 0)


def tiny_t5() -> Any:
    """Build an encoder-decoder model."""
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **_special_ids()
    )
    return _from_config(transformers.AutoModelForSeq2SeqLM, config, 0)


def tiny_mamba() -> Any:
    """Build a causal model that has no MLP."""
    config = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, **_special_ids())
    return _from_config(transformers.AutoModelForCausalLM, config, 0)


def tiny_bitnet() -> Any:
    """Build a causal model with a norm over the neurons of its MLPs."""
    return _from_config(transformers.AutoModelForCausalLM, _without_head_dim("BitNetConfig")(), 0)


_TEXT = (
    "Stars form when clouds of gas and dust collapse under their own weight.",
    "The heart pumps blood through arteries and veins to every part of the body.",
    "Bread rises because yeast eats sugar and gives off carbon dioxide.",
    "The football team won the final match after extra time and penalties.",
    "Judges interpret the law and decide what a contract means in court.",
    "How do plants turn sunlight, water and air into food?",
    "What is the capital of France, and how many people live there?",
    "Interest rates rise when the central bank wants to slow inflation.",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Train a small byte-level tokenizer: any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def save_tiny_checkpoint(folder: str | os.PathLike[str], seed: int = 0, **config_overrides: Any) -> str:
    """Save a tiny Llama with a real tokenizer and a chat template, ready for ``load_model`` and the commands.

    Greedy decoding never ends by itself: the special tokens' logits are 0, below the best of the others.

    Args:
        folder: where to; made if missing.
        seed: of the weights.
        **config_overrides: of `transformers.LlamaConfig`, such as ``num_hidden_layers``.

    Returns:
        The folder.
    """
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config_overrides,
    }
    model = _from_config(transformers.AutoModelForCausalLM, _llama_like("LlamaConfig", **settings)(), seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[tokenizer.all_special_ids] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
