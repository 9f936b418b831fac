"""Norms of transformers' models as the compiled loops read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from coreinfer_sim.engines.lean.attention import OF_CENTRED_HEADS, OF_HEADS, OF_NONE, OF_WIDTH
from coreinfer_sim.engines.lean.matrix import Array, vector
from coreinfer_sim.engines.lean.step import LAYER, NO_NORM, RMS

_CENTRED = ("CohereLayerNorm", "Cohere2LayerNorm", "OlmoLayerNorm", "NemotronLayerNorm1P")
_PLUS_ONE = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm", "NemotronLayerNorm1P")
"""Those that multiply by one more than their weights."""
_EPS = 1e-5
"""Of OlmoLayerNorm, which has no attribute of it."""


def norm_kind(norm: Any) -> int | None:
    """Return what the loops call a norm; None: they do not know it."""
    name = type(norm).__name__
    if norm is None:
        return NO_NORM
    if type(norm) is nn.LayerNorm or name in _CENTRED:
        return LAYER
    return RMS if name.endswith("RMSNorm") else None


def norm_values(norm: Any, shape: tuple[int, ...]) -> tuple[Array, np.float32]:
    """Return a norm's weights and biases, float32 [2, *shape], and its ε."""
    values = np.stack([np.ones(shape, np.float32), np.zeros(shape, np.float32)])
    if norm is None:
        return values, np.float32(0)
    for place, name in enumerate(("weight", "bias")):
        own: torch.Tensor | None = getattr(norm, name, None)
        if own is not None:
            values[place] = vector(own).reshape(shape) if own.numel() == values[place].size else vector(own)
    if type(norm).__name__ in _PLUS_ONE:
        values[0] += 1
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or _EPS
    return values, np.float32(eps)


def head_norm_kind(norm: Any, head_dim: int, n_heads: int) -> int | None:
    """Return what the loops call a norm of queries or keys, see `attention.OF_NONE`; None: they do not know it."""
    kind = norm_kind(norm)
    if kind == NO_NORM:
        return OF_NONE
    n_weights = norm.weight.numel()
    if kind == RMS and n_weights == n_heads * head_dim and norm.weight.dim() == 1 and n_heads > 1:
        return OF_WIDTH
    if n_weights not in (head_dim, n_heads * head_dim) or norm.weight.shape[-1] != head_dim:
        return None
    return {RMS: OF_HEADS, LAYER: OF_CENTRED_HEADS}.get(kind or 0)


def norm_bytes(norm: Any) -> int:
    """Return the bytes that a step reads of a norm: its parameters as float32."""
    return 0 if norm is None else 4 * sum(parameter.numel() for parameter in norm.parameters())
