"""Many positions of a given text at a time, by the weights and the arithmetic of single decode steps.

The compiled loops widen stored weights and sum in float32; torch's float32 products over the same widened weights differ from
them in the order of sums alone, and read a weight once for all positions. Packed weights, whose inputs are rounded to 8 bits, are
multiplied by the loops themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.engines.lean.blocks import LeanModel
from coreinfer_sim.engines.lean.matrix import Array, Matrix


def forced_states(
    weights: LeanModel,
    dtype: torch.dtype,
    ids: torch.Tensor,
    cache: Any,
    mlp: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return what the output head multiplies for tokens that follow a cached prompt, float32 [n_tokens, d_model].

    Args:
        weights: of the model.
        dtype: in which keys and values are cached.
        ids: [n_tokens].
        cache: of transformers, one row; it is left as it was. None: no prompt.
        mlp: maps the number of a layer and its normalised inputs [n_tokens, d_model] to what its MLP adds.
    """
    n_past = 0 if cache is None else int(cache.get_seq_length())
    places = torch.arange(n_past, n_past + len(ids))
    visible = torch.arange(n_past + len(ids))[None] <= places[:, None]
    cos, sin = weights.angles(places)
    hidden = weights.embedded(ids)
    for number in range(len(weights.attention)):
        past = None if cache is None else (cache.layers[number].keys, cache.layers[number].values)
        x = _normalised(hidden, weights.norms[number, 0], weights.eps[number, 0])
        hidden += _attention(weights, number, x, dtype, past, cos, sin, visible)
        x = _normalised(hidden, weights.norms[number, 1], weights.eps[number, 1])
        hidden += mlp(number, x)
    return _normalised(hidden, weights.norms[-1, 0], weights.eps[-1, 0])


def _attention(
    weights: LeanModel,
    number: int,
    x: torch.Tensor,
    dtype: torch.dtype,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Return what a layer's attention adds for ``x`` [n_tokens, d_model]; keys and values are rounded as the cache holds them."""
    head_dim, norms = cos.shape[-1], weights.head_norms[number]
    q, k, v, o = weights.attention[number]

    def heads(matrix: Matrix) -> torch.Tensor:
        return matrix.times(x).reshape(len(x), -1, head_dim).transpose(0, 1)  # [n_heads, n_tokens, head_dim]

    query, keys, values = heads(q), heads(k), heads(v)
    if len(norms):
        eps = weights.eps[number, 0]
        query, keys = (_normalised(part, norm, eps) for part, norm in zip((query, keys), norms, strict=True))
    query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
    keys, values = keys.to(dtype).float(), values.to(dtype).float()
    if past is not None:
        keys, values = (torch.cat([old[0].float(), new], 1) for old, new in zip(past, (keys, values), strict=True))
    mixed = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=visible, scale=float(weights.scaling), enable_gqa=True
    )[0]
    return o.times(mixed.transpose(0, 1).flatten(1))


def _normalised(x: torch.Tensor, weight: Array, eps: np.float32) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + float(eps)) * torch.from_numpy(weight)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to heads [n_heads, n_tokens, head_dim], the halves of their features paired."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
