"""Tiny configurations of every model type that the lean engine decodes, and single steps of it."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from calls import token_ids
from tiny_models import CONTEXT, INIT, N_LAYERS, VOCABULARY, model_of
from transformers import DynamicCache

from coreinfer_sim.engines.steps import Step, StepInputs

WINDOW = 6
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": INIT,
    "tie_word_embeddings": False,
    **IDS,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0}
NEOX = {**SMALL, "num_key_value_heads": None}
FALCON = {**SMALL, "ffn_hidden_size": 80, "alibi": False}


def rope(kind, **other):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **other}}


LONG = rope("longrope", long_factor=[2.0, 3.0, 4.0, 5.0], short_factor=[1.0, 1.1, 1.2, 1.3])
LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
TYPES = {
    "llama": ("LlamaConfig", {**SMALL, **BIASES}),
    "llama-linear": ("LlamaConfig", {**SMALL, **rope("linear", factor=2.0)}),
    "llama-llama3": ("LlamaConfig", {**SMALL, **LLAMA3}),
    "llama-yarn": ("LlamaConfig", {**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "llama-dynamic": ("LlamaConfig", {**SMALL, "max_position_embeddings": 24, **rope("dynamic", factor=4.0)}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {**SMALL, **QWEN_WINDOW}),
    "qwen3": ("Qwen3Config", {**SMALL, **QWEN_WINDOW, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**SMALL, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**SMALL, **GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3TextConfig", {**SMALL, **GEMMA, "final_logit_softcapping": None}),
    "vaultgemma": ("VaultGemmaConfig", {**SMALL, **GEMMA, "attn_logit_softcapping": 2.0}),
    "ministral": ("MinistralConfig", {**SMALL, **SLIDING, "head_dim": 8}),
    "cwm": ("CwmConfig", {**SMALL, **SLIDING, "head_dim": 8}),
    "seed_oss": ("SeedOssConfig", {**SMALL, **BIASES, "attention_out_bias": True, "head_dim": 8}),
    "glm": ("GlmConfig", {**SMALL, "head_dim": 8, "attention_bias": True}),
    "helium": ("HeliumConfig", {**SMALL, "head_dim": 8}),
    "ernie4_5": ("Ernie4_5Config", {**SMALL, "head_dim": 8, "use_bias": True}),
    "olmo": ("OlmoConfig", SMALL),
    "exaone4": ("Exaone4Config", {**SMALL, **SLIDING}),
    "stablelm": ("StableLmConfig", {**SMALL, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmConfig", {**SMALL, "use_parallel_residual": True}),
    "phi3": ("Phi3Config", {**SMALL, "sliding_window": WINDOW}),
    "phi3-longrope": (
        "Phi3Config",
        {**SMALL, "max_position_embeddings": 64, "original_max_position_embeddings": 24, **LONG},
    ),
    "smollm3": ("SmolLM3Config", {**SMALL, "no_rope_layers": [1, 0, 1]}),
    "granite": ("GraniteConfig", {**SMALL, **GRANITE}),
    "hyperclovax": ("HyperCLOVAXConfig", {**SMALL, **GRANITE, **BIASES}),
    "hyperclovax-no-post-norm": ("HyperCLOVAXConfig", {**SMALL, "use_post_norm": False}),
    "olmo2": ("Olmo2Config", SMALL),
    "olmo3": ("Olmo3Config", {**SMALL, **SLIDING}),
    "glm4": ("Glm4Config", {**SMALL, "head_dim": 8, "attention_bias": True}),
    "cohere": ("CohereConfig", {**SMALL, "logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**SMALL, **SLIDING, "head_dim": 8}),
    "internlm3": ("InternLM3Config", {**SMALL, **BIASES, "head_dim": 8}),
    "iquestcoder": ("IQuestCoderConfig", {**SMALL, "head_dim": 8}),
    "jais2": ("Jais2Config", {**SMALL, **BIASES}),
    "nemotron": ("NemotronConfig", {**SMALL, **BIASES, "head_dim": 8}),
    "arcee": ("ArceeConfig", {**SMALL, "head_dim": 8}),
    "starcoder2": ("Starcoder2Config", {**SMALL, "sliding_window": WINDOW}),
    "phi": ("PhiConfig", {**SMALL, "qk_layernorm": True}),
    "gpt_neox": ("GPTNeoXConfig", NEOX),
    "gpt_neox-sequential": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "falcon": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-one-key": ("FalconConfig", {**FALCON, "new_decoder_architecture": False, "multi_query": True}),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": INIT}),
    "gpt2": (
        "GPT2Config",
        {**IDS, "n_embd": 32, "n_inner": 72, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT},
    ),
}
"""Configuration class and settings by type, and after a dash by what differs."""


def model_named(name):
    config, settings = TYPES[name]
    return model_of(getattr(transformers, config)(**settings))


def step_of(cache, held, call, token):
    """A step of one row."""
    row = np.zeros(1, np.int64), np.zeros(1, bool), 1
    return Step(StepInputs(torch.tensor([[token]]), cache, {}, *row, None), [([0], held)], call)


def steps(engine, cache, held, tokens):
    """Decode given tokens in one row; return their logits [n_tokens, vocabulary]."""
    each = [step_of(cache, held, engine.call, token) for token in tokens]
    return torch.stack([engine.step(one.inputs, one.groups).logits[0, 0] for one in each])


def prefilled(model, n=9):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=token_ids(1, n), past_key_values=cache, use_cache=True)
    return cache
