"""Many positions of a given text at a time, by the weights and the arithmetic of single decode steps.

The compiled loops widen stored weights and sum in float32. torch's float32 products over the same widened weights differ from
them in the order of sums alone, and read a weight once for all positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.engines.lean.blocks import Block, LeanModel
from coreinfer_sim.engines.lean.intrinsics import RELU
from coreinfer_sim.engines.lean.weights import Array, NeuronMLP, Product

_NEURONS = 1024  # whose weights are widened at a time


def forced_logits(
    weights: LeanModel, dtype: torch.dtype, ids: torch.Tensor, cache: Any, held: Mapping[int, NeuronMLP]
) -> torch.Tensor:
    """Return float32 logits [n_tokens, vocabulary] of tokens that follow a cached prompt.

    Args:
        weights: of the model.
        dtype: in which keys and values are cached.
        ids: [n_tokens].
        cache: of transformers, one row; it is left as it was. None: no prompt.
        held: compact MLPs; a layer that is not named stays dense.
    """
    n_past = 0 if cache is None else int(cache.get_seq_length())
    places = torch.arange(n_past, n_past + len(ids))
    visible = torch.arange(n_past + len(ids))[None] <= places[:, None]
    cos, sin = weights.angles(places)
    hidden = weights.embeddings(ids).float()
    for number, block in enumerate(weights.blocks):
        past = None if cache is None else (cache.layers[number].keys, cache.layers[number].values)
        hidden += _attention(block, hidden, dtype, past, cos, sin, visible, float(weights.scaling))
        x = _normalised(hidden, block.mlp_norm, block.mlp_eps)
        if number in held:
            hidden += _compact(held[number], x, weights.kind)
        else:
            gate, up, down = weights.dense_mlp(number)
            hidden += down.times(_activated(gate.times(x), weights.kind).mul_(up.times(x)))
    return weights.head.times(_normalised(hidden, weights.norm, weights.norm_eps))


def _attention(
    block: Block,
    hidden: torch.Tensor,
    dtype: torch.dtype,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return what attention adds to ``hidden`` [n_tokens, d_model]; keys and values are rounded as the cache holds them."""
    x = _normalised(hidden, block.norm, block.eps)
    head_dim = cos.shape[-1]

    def heads(product: Product) -> torch.Tensor:
        return product.times(x).reshape(len(x), -1, head_dim).transpose(0, 1)  # [n_heads, n_tokens, head_dim]

    query, keys, values = heads(block.q), heads(block.k), heads(block.v)
    if len(block.head_norms):
        query, keys = (
            _normalised(part, norm, block.eps) for part, norm in zip((query, keys), block.head_norms, strict=True)
        )
    query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
    keys, values = keys.to(dtype).float(), values.to(dtype).float()
    if past is not None:
        keys, values = (torch.cat([old[0].float(), new], 1) for old, new in zip(past, (keys, values), strict=True))
    mixed = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=visible, scale=scaling, enable_gqa=True
    )[0]
    return block.o.times(mixed.transpose(0, 1).flatten(1))


def _compact(mlp: NeuronMLP, x: torch.Tensor, kind: int) -> torch.Tensor:
    """Return what a compact MLP adds for rows [n_tokens, d_model]."""
    scale, bias = torch.from_numpy(mlp.scale), torch.from_numpy(mlp.bias)
    added = torch.from_numpy(mlp.out_bias).expand(len(x), -1).clone()
    for begin in range(0, len(mlp.weight), _NEURONS):
        part = slice(begin, begin + _NEURONS)
        gate_rows, up_rows, out_columns = mlp.weight[part].float().unbind(1)
        gate = (x @ gate_rows.T) * scale[part, 0] + bias[part, 0]
        up = (x @ up_rows.T) * scale[part, 1] + bias[part, 1]
        added += (_activated(gate, kind) * up * scale[part, 2]) @ out_columns
    return added


def _activated(gate: torch.Tensor, kind: int) -> torch.Tensor:
    return F.relu(gate) if kind == RELU else F.silu(gate)


def _normalised(x: torch.Tensor, weight: Array, eps: np.float32) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + float(eps)) * torch.from_numpy(weight)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to heads [n_heads, n_tokens, head_dim], the halves of their features paired."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
