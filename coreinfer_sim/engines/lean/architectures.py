"""Where each model type has its modules, and what its blocks do: one short entry a type.

To decode a further type, add an entry to `ARCHITECTURES`: the names of its modules as they differ from Llama's, and what else
differs. What a norm, an activation or a window is, is read from the modules and the configuration; see `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

PRE = ("input_layernorm", None, "post_attention_layernorm", None)
"""Names of a layer's norms: before and after attention, before and after the MLP."""
SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
ONE = ("input_layernorm", None, None, None)


@dataclass(frozen=True)
class Architecture:
    """Where a model has its modules, and what it does otherwise than Llama."""

    decoder: str = "model"
    """The module that holds the layers, the embeddings' rotary positions and the last norm."""
    layers: str = "layers"
    last_norm: str = "norm"
    norms: tuple[str | None, str | None, str | None, str | None] = PRE
    attention: str = "self_attn"
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Projections of queries, keys and values, or the one for all three."""
    by_key_head: bool = False
    """The one projection gives the queries, the key and the value of each key head together, rather than all queries first."""
    copied_keys: bool = False
    """The cache holds a key for each query head, though several are the same."""
    output: str = "o_proj"
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    """Norms of queries and keys, if the attention has them."""
    parallel: bool = False
    """The MLP reads the stream as it was before attention; without a norm of its own, what attention reads."""
    interleaved: bool = False
    """Rotary positions turn neighbouring features, rather than one of each half."""
    turns: Callable[[Any], bool] = lambda attention: True
    """Whether a layer, by its attention module, has rotary positions."""
    positions: str | None = None
    """Table of learned positions in the decoder."""
    first_position: int = 0
    """Its row for the first position."""
    embedding: float = 1.0
    """Factor of the embeddings, beside that of their own module."""
    added: float = 1.0
    """Factor of what attention and MLP add to the stream."""
    logits: float = 1.0
    """Factor of the logits."""
    logits_cap: float = 0.0
    """Soft cap c of the logits, c tanh(logit / c); 0: none."""
    scores_cap: float = 0.0
    """That of the attention scores."""
    packs: bool = True
    """Whether a checkpoint can be laid out without loading it: all matrices are linear layers."""

    @property
    def plain_logits(self) -> bool:
        """Whether logits are what the output head's matrix gives."""
        return self.logits == 1 and not self.logits_cap


LLAMA = Architecture()


def _gemma2(config: Any) -> Architecture:
    return Architecture(
        norms=SANDWICH if config.model_type == "gemma2" else (SANDWICH[0], None, SANDWICH[2], None),
        logits_cap=config.final_logit_softcapping or 0.0,
        scores_cap=config.attn_logit_softcapping or 0.0,
    )


def _gemma3(config: Any) -> Architecture | str:
    if config.use_bidirectional_attention:
        return "its attention looks ahead"
    return Architecture(norms=SANDWICH, logits_cap=config.final_logit_softcapping or 0.0)


def _granite(config: Any) -> Architecture:
    return Architecture(
        embedding=config.embedding_multiplier, added=config.residual_multiplier, logits=1.0 / config.logits_scaling
    )


def _hyperclovax(config: Any) -> Architecture:
    norms = ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2") if config.use_post_norm else PRE
    return replace(_granite(config), norms=norms, logits=config.logits_scaling)


def _cohere(config: Any) -> Architecture:
    return Architecture(norms=ONE, parallel=True, interleaved=True, logits=config.logit_scale)


def _cohere2(config: Any) -> Architecture:
    return replace(_cohere(config), turns=lambda attention: attention.sliding_window is not None)


def _falcon(config: Any) -> Architecture | str:
    if config.alibi:
        return "it has ALiBi positions"
    norms: tuple[str | None, ...] = PRE
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        norms = ("ln_attn", None, "ln_mlp", None)
    elif config.new_decoder_architecture or config.parallel_attn:
        norms = ONE
    return Architecture(
        "transformer",
        "h",
        "ln_f",
        norms,  # type: ignore[arg-type]
        "self_attention",
        ("query_key_value",),
        by_key_head=config.new_decoder_architecture or not config.multi_query,
        copied_keys=config.new_decoder_architecture,
        output="dense",
        parallel=config.new_decoder_architecture or config.parallel_attn,
    )


def _gpt_neox(config: Any) -> Architecture:
    return Architecture(
        "gpt_neox",
        last_norm="final_layer_norm",
        attention="attention",
        inputs=("query_key_value",),
        by_key_head=True,
        output="dense",
        parallel=config.use_parallel_residual,
    )


def _opt(config: Any) -> Architecture | str:
    if not config.do_layer_norm_before:
        return "its norms follow the sums"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected"
    return Architecture(
        "model.decoder",
        last_norm="final_layer_norm",
        norms=("self_attn_layer_norm", None, "final_layer_norm", None),
        output="out_proj",
        positions="embed_positions",
        first_position=2,
    )


def _gpt2(config: Any) -> Architecture | str:
    if config.add_cross_attention:
        return "it attends to an encoder"
    return Architecture(
        "transformer",
        "h",
        "ln_f",
        ("ln_1", None, "ln_2", None),
        "attn",
        ("c_attn",),
        output="c_proj",
        positions="wpe",
        packs=False,
    )


def _phi(config: Any) -> Architecture:
    return Architecture(
        last_norm="final_layernorm",
        norms=ONE,
        output="dense",
        head_norms=("q_layernorm", "k_layernorm"),
        parallel=True,
    )


def _olmo(config: Any) -> Architecture | str:
    return LLAMA if config.clip_qkv is None else "its queries, keys and values are clipped"


def _stablelm(config: Any) -> Architecture | str:
    if config.qk_layernorm:
        return "its queries and keys have a norm for each head"
    return Architecture(parallel=config.use_parallel_residual)


def _same(architecture: Architecture) -> Callable[[Any], Architecture | str]:
    return lambda config: architecture


_LIKE_LLAMA = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "starcoder2", "arcee", "nemotron"),
    *("seed_oss", "cwm", "internlm3", "iquestcoder", "jais2"),
)
ARCHITECTURES: dict[str, Callable[[Any], Architecture | str]] = {
    **dict.fromkeys(_LIKE_LLAMA, _same(LLAMA)),
    **dict.fromkeys(("glm", "helium", "ernie4_5"), _same(Architecture(interleaved=True))),
    "gemma2": _gemma2,
    "vaultgemma": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _same(Architecture(inputs=("qkv_proj",))),
    "smollm3": _same(Architecture(turns=lambda attention: bool(attention.use_rope))),
    "granite": _granite,
    "hyperclovax": _hyperclovax,
    **dict.fromkeys(("olmo2", "olmo3"), _same(Architecture(norms=POST))),
    "olmo": _olmo,
    "exaone4": _same(
        Architecture(norms=POST, turns=lambda attention: attention.sliding_window is None or attention.is_sliding)
    ),
    "stablelm": _stablelm,
    "glm4": _same(
        Architecture(
            norms=(
                "input_layernorm",
                "post_self_attn_layernorm",
                "post_attention_layernorm",
                "post_mlp_layernorm",
            ),
            interleaved=True,
        )
    ),
    "cohere": _cohere,
    "cohere2": _cohere2,
    "falcon": _falcon,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "opt": _opt,
    "phi": _phi,
}
"""By model type: what a configuration asks for, or why the loops cannot do it."""


def architecture_of(config: Any) -> Architecture | str:
    """Return how a model of a configuration is built, or why it cannot be decoded here."""
    if config.model_type not in ARCHITECTURES:
        return f"{config.model_type} is not among the types of docs/models.md that it decodes"
    return ARCHITECTURES[config.model_type](config)
