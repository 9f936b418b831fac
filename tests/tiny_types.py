"""A tiny model of any type that transformers knows, made from its own configuration class, and what is checked on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from calls import Snapshot, everything, selection
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ModelError, UnsupportedModelError
from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import MLPLayer, find_mlps
from coreinfer_sim.models.source import auto_class
from coreinfer_sim.models.taps import recorded_activations

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
"""All types of text models and of models that write text about images, in the installed transformers."""
N_LAYERS = 2
_LARGEST_N_LAYERS = 8
IDS = torch.randint(4, 90, (1, 9), generator=torch.Generator().manual_seed(0))
SLOW = {"blt": "decodes bytes by four models of different widths"}
"""Types that are not even made small, and why."""
_LAYERS = r"^(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers)$"
_SIZES = (
    (r"intermediate_size|ffn_dim|n_inner|ffn_hidden_size|dim_ff|^d_inner$|^d_ff$|feed_forward_size", 48),
    (_LAYERS, N_LAYERS),
    (r"^(depth|num_hidden_blocks)$", N_LAYERS),
    (r"num_attention_heads|^n_heads?$|^num_heads$|attention_heads$|ngram_heads", 4),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"(^|_)(head_dim|d_kv|kv_channels|d_head)$", 8),
    (r"vocab_size|^n_vocab$", 96),
    (r"max_position_embeddings|^n_positions$|^n_ctx$|^max_seq_len$|^seq_length$", 128),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|ffn_num_experts)$", 4),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k)$", 2),
    (r"lora_rank$", 8),
    (r"hidden_size$|embed_dim$|^(d_model|n_embd|dim|emb_dim|embedding_size|dim_model|lru_width|projection_dim)$", 32),
    (r"^word_embed_proj_dim$|^hidden_size_per_layer_input$", 32),
    (r"^rotary_dim$", 4),
    (r"d_state$|state_size$|chunk_size$", 8),
    (r"^(n_group|topk_group)$", 1),
    (r"^image_size$", 28),
    (r"^patch_size$", 14),
    (r"^first_k_dense_replace$", 1),
    (r"^num_kv_shared_layers$", 0),
)
"""Patterns of the names of sizes, and the largest value of each."""
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
_ROTATED = {"rope_type": "default", "rope_theta": 10000.0}
_BY_SECTIONS = {"rope_parameters": {**_ROTATED, "mrope_section": [2, 1, 1]}}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64}
_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
            "glm4v_text",
            "glm46v_text",
            "glm_ocr_text",
            "glmga_text",
            "paddleocr_vl_text",
        ],
        _BY_SECTIONS,
    ),
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mlp_multipliers": [0.9, 0.3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTATED}},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "glm4v_moe_text": {"rope_parameters": {**_ROTATED, "mrope_section": [1, 1, 0]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "intermediate_size": 96},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "num_hidden_layers": 3,
    },
}
"""What the sizes of a type ask for."""
_DERIVED = {
    "head_dim": 8,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
"""Sizes that some configurations leave open, but the models ask for."""
_OTHERS = ("model_type", "transformers_version", "architectures", "dtype")


def tiny_config(model_type: str) -> Any:
    """Return a configuration of a type with all of its sizes made small."""
    made = CONFIG_MAPPING[model_type]
    return made(**_small(made()))


def _small(config: Any) -> dict[str, Any]:
    given = config.to_dict()
    small: dict[str, Any] = {"tie_word_embeddings": False}
    by_layer = [
        value for name, value in given.items() if name.endswith("layer_types") and isinstance(value, list) and value
    ]
    n_layers = max((_n_layers(kinds) for kinds in by_layer), default=N_LAYERS)
    for name, value in given.items():
        if name in config.sub_configs and isinstance(value, dict):
            part = getattr(config, name)
            small[name] = {"model_type": part.model_type, **_small(part)}
        elif name in _OTHERS:
            continue
        elif value is None and name in _DERIVED:
            small[name] = _DERIVED[name]
        elif isinstance(value, list) and by_layer and len(value) == len(by_layer[0]):
            small[name] = value[:n_layers]
        elif name in _IDS:
            small[name] = _IDS[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            largest = next((size for pattern, size in _SIZES if re.search(pattern, name)), value)
            small[name] = n_layers if by_layer and re.search(_LAYERS, name) else min(value, largest)
    if hasattr(config, "is_decoder"):
        small["is_decoder"] = True
    if "qk_rope_head_dim" in given:  # such attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    return {**small, **_SETTINGS.get(config.model_type, {})}


def _n_layers(kinds: list[str]) -> int:
    """Return how many layers hold one of each kind, at least two."""
    last = max(kinds.index(kind) for kind in set(kinds))
    return min(max(N_LAYERS, last + 1), max(N_LAYERS, _LARGEST_N_LAYERS), len(kinds))


def tiny_of_type(model_type: str) -> Any:
    """Return a model of a type with random weights, float32, in which MLPs matter beside the residual stream."""
    config = tiny_config(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto_class(config).from_config(config, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Tried:
    """What came of a type."""

    reason: str | None
    """Why it is left out; None: everything that is checked holds."""
    text_part: str = ""
    """The type of what reads text."""
    layout: str = ""
    """Of its MLPs."""
    why_slow: str | None = None
    """Why the compiled loops do not decode it; None: they do."""


def tried(model_type: str) -> Tried:
    """Make a tiny model of a type and check it."""
    if model_type in SLOW:
        return Tried(SLOW[model_type])
    try:
        model = tiny_of_type(model_type)
    except Exception as error:
        return Tried(f"no tiny model could be made of its configuration: {_first_line(error)}")
    try:
        layers = find_mlps(model)
    except UnsupportedModelError as error:
        return Tried(str(error).rpartition(";")[0])
    with torch.no_grad():
        _enlarged(layers)
        try:
            logits, tokens = _logits(model), _generated(model)
        except Exception as error:
            return Tried(f"transformers does not decode text alone with it: {_first_line(error)}")
        why_slow = LeanEngine.refuses(model, DecodeConfig())
        return Tried(
            _checked(model, layers, logits, tokens),
            layers[0].family,
            _layout(max(layers, key=lambda each: each.expert is not None)),
            why_slow,
        )


def _layout(layer: MLPLayer) -> str:
    kind = "gated in one matrix" if layer.fused else "gated" if layer.gated else "plain"
    kind += "" if layer.expert is None else " experts"
    return kind + (", a norm behind" if layer.post_norm else "")


def _checked(model: Any, layers: list[MLPLayer], untouched: torch.Tensor, tokens: torch.Tensor) -> str | None:
    """Return what does not hold of a model, whose own logits and tokens are given, or None."""
    before = Snapshot(model)
    # 1) the activation site, and statistics of it
    seen: dict[int, list[torch.Tensor]] = {layer.number: [] for layer in layers}
    try:
        with recorded_activations(layers, lambda number, z: seen[number].append(z.clone())) as tap:
            tap.set_mask(torch.ones_like(IDS))
            dense = _logits(model)
    except ModelError as error:
        return str(error).rpartition(";")[0]
    reached = [layer for layer in layers if seen[layer.number]]
    assert {layer.block for layer in reached} == {layer.block for layer in layers}
    assert all(layer in reached or layer.expert is not None for layer in layers)
    for layer in reached:
        statistics = activation_statistics(seen[layer.number][0], [0, IDS.numel()], 0.4)
        assert seen[layer.number][0].shape == (IDS.numel(), layer.d_ff)
        assert statistics.counts.shape == (1, layer.d_ff) and statistics.counts.sum() > 0
    if all(layer.expert is None for layer in layers):  # what experts give is added up before a norm
        assert [layer.post_norm for layer in layers] == _norms_behind(model, layers)
    # 2) a compact MLP, the masked one, and a whole one
    chosen = selection(model, 0.5)
    with installed(layers, chosen):
        compact = _logits(model)
    with _masked(layers, chosen.ids):
        masked = _logits(model)
    scale = float(dense.abs().max())
    if float((masked - dense).abs().max()) < 1e-3 * scale:
        return "the MLPs of a tiny model change its logits too little to be checked"
    if float((compact - masked).abs().max()) > 1e-4 * scale:
        return f"compact MLPs differ from masked ones by {float((compact - masked).abs().max()) / scale:.1g}"
    with installed(layers, selection(model, 1.0)):
        whole = _logits(model)
    if float((whole - dense).abs().max()) > 1e-5 * scale:
        return f"whole compact MLPs differ from dense ones by {float((whole - dense).abs().max()) / scale:.1g}"
    # 3) decode
    with SparseModel(model, everything(model), engine="transformers") as sparse:
        found = _generated(sparse)
    assert torch.equal(found, tokens)
    before.check()
    assert torch.equal(_logits(model), untouched)
    return None


def _norms_behind(model: Any, layers: list[MLPLayer]) -> list[bool]:
    """Observe of each MLP whether a norm reads what it gives, or gives what the layer gives."""
    names = {id(module): path for path, module in model.named_modules()}
    blocks = [model.get_submodule(re.split(r"(?<=\.\d)\.", names[id(layer.owner)])[0]) for layer in layers]
    events: list[tuple[nn.Module, Any, Any]] = []
    norms = [module for module in model.modules() if _is_norm(module)]
    watched = {id(module): module for module in (*norms, *(layer.output for layer in layers), *blocks)}
    hooks = [
        module.register_forward_hook(
            lambda module, given, out: events.append((module, given[0] if given else None, out))
        )
        for module in watched.values()
    ]
    _logits(model)
    for hook in hooks:
        hook.remove()
    return [_is_behind(layer, block, events) for layer, block in zip(layers, blocks, strict=True)]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not list(module.children())


def _is_behind(layer: MLPLayer, block: nn.Module, events: list[tuple[nn.Module, Any, Any]]) -> bool:
    inside = {*block.modules()}
    own = [event for event in events if event[0] in inside]
    first = next(place for place, event in enumerate(own) if event[0] is layer.output)
    y, last = own[first][2], own[-1][2]
    last = last[0] if isinstance(last, tuple | list) else last
    norms = [event for event in own[first:] if _is_norm(event[0])]
    return any(_same(read, y) or _same(out, last) for _, read, out in norms)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def _generated(model: Any) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    tokens: torch.Tensor = model.generate(IDS, **options)
    return tokens


def _enlarged(layers: list[MLPLayer]) -> None:
    """Give the MLPs weights that let them matter beside the residual stream."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for path in layer.projections:
            projection = layer.projection(path)
            for parameter in (each for each in (projection.weight, projection.bias) if each is not None):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def _masked(layers: list[MLPLayer], ids: dict[int, torch.Tensor]) -> Iterator[None]:
    """Set the neurons that are not kept to zero."""

    def mask(kept: torch.Tensor) -> Any:
        return lambda _module, given: (given[0] * torch.zeros(given[0].shape[-1]).index_fill(0, kept, 1.0),)

    hooks = [layer.output.register_forward_pre_hook(mask(ids[layer.number])) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
