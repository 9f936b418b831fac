"""Many positions of a given text at a time, by the weights and the arithmetic of single decode steps.

The compiled loops widen stored weights and sum in float32; torch's float32 products over the same widened weights differ from
them in the order of sums alone, and read a weight once for all positions. Packed weights, whose inputs are rounded to 8 bits, are
multiplied by the loops themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from coreinfer_sim.engines.lean.attention import OF_CENTRED_HEADS, OF_HEADS, OF_NONE
from coreinfer_sim.engines.lean.blocks import LeanModel
from coreinfer_sim.engines.lean.formats import TILE
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.step import (
    AFTER_ATTENTION,
    AFTER_MLP,
    BEFORE_ATTENTION,
    BEFORE_MLP,
    LAYER,
    N_NORMS,
    NO_NORM,
    RMS,
    Layers,
)


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
    n_past, layers = 0 if cache is None else int(cache.get_seq_length()), weights.description
    places = torch.arange(n_past, n_past + len(ids))
    angles = weights.angles(places, text=True)
    hidden = weights.embedded(ids, places)
    for number in range(len(weights.attention)):
        norms = [partial(_normed, layers, number, place) for place in range(N_NORMS)]
        past = None if cache is None else (cache.layers[number].keys, cache.layers[number].values)
        x = norms[BEFORE_ATTENTION](hidden)
        given = _attention(weights, number, x, dtype, past, angles[:, layers.turns[number]], places)
        given = norms[AFTER_ATTENTION](given) * float(layers.added)
        if not layers.parallel:
            hidden = hidden + given
            x = norms[BEFORE_MLP](hidden)
        elif layers.norm_kinds[number, BEFORE_MLP] != NO_NORM:
            x = norms[BEFORE_MLP](hidden)
        made = norms[AFTER_MLP](mlp(number, x)) * float(layers.added)
        hidden = hidden + given + made if layers.parallel else hidden + made
    return _normed(layers, len(weights.attention), 0, hidden)


def _normed(layers: Layers, number: int, place: int, x: torch.Tensor) -> torch.Tensor:
    """Return rows [n, d_model] after one of a layer's norms."""
    kind, (weight, bias) = layers.norm_kinds[number, place], torch.from_numpy(layers.norms[number, place])
    eps = float(layers.eps[number, place])
    if kind == LAYER:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _scaled(x, eps) * weight if kind == RMS else x


def _attention(
    weights: LeanModel,
    number: int,
    x: torch.Tensor,
    dtype: torch.dtype,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    angles: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """Return what a layer's attention gives for ``x`` [n_tokens, d_model], with keys and values as the cache rounds them."""
    layers, *inputs = weights.description, *weights.attention[number][:-1]
    columns = torch.from_numpy(layers.columns[number])
    head_dim, n_keys = layers.head_norms.shape[-1], weights.n_keys
    n_heads = len(columns) - 2 * n_keys
    # 1) heads, [n, n_tokens, head_dim]
    outputs = [F.pad(part.times(x), (0, -part.n_out % TILE)) for part in inputs]
    every = torch.cat(outputs, 1)[:, columns[:, None] + torch.arange(head_dim)].transpose(0, 1)
    turned = every[: n_heads + n_keys]
    kind = layers.head_kinds[number]
    if kind != OF_NONE:
        turned = _normed_heads(kind, turned, layers.head_norms[number], float(layers.eps[number, N_NORMS]), n_heads)
    turned = _rotated(turned, *angles, bool(layers.interleaved))
    query, keys, values = turned[:n_heads], turned[n_heads:].to(dtype).float(), every[-n_keys:].to(dtype).float()
    # 2) all positions that a window leaves
    if past is not None:
        keys, values = (torch.cat([old[0].float(), new], 1) for old, new in zip(past, (keys, values), strict=True))
    of_keys = torch.arange(int(places[-1]) + 1 - keys.shape[1], int(places[-1]) + 1)
    visible, window = of_keys[None] <= places[:, None], int(layers.windows[number])
    if window:
        visible &= of_keys[None] > places[:, None] - window
    scaling, cap = (float(value) for value in layers.scores[number])
    keys, values = (part.repeat_interleave(n_heads // n_keys, 0) for part in (keys, values))
    if cap:
        scores = ((query @ keys.transpose(1, 2)) * (scaling / cap)).tanh() * cap
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values
    else:
        mixed = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=visible, scale=scaling)[
            0
        ]
    return weights.attention[number][-1].times(mixed.transpose(0, 1).flatten(1))


def _normed_heads(kind: int, heads: torch.Tensor, norms: Array, eps: float, n_queries: int) -> torch.Tensor:
    """Normalise queries and keys [n, n_tokens, head_dim]; see `attention`."""
    weight, bias = (torch.from_numpy(norms[:, place, None]) for place in range(2))  # [n, 1, head_dim]
    if kind == OF_CENTRED_HEADS:
        return F.layer_norm(heads, heads.shape[-1:], eps=eps) * weight + bias
    if kind == OF_HEADS:
        return _scaled(heads, eps) * weight
    parts = heads[:n_queries], heads[n_queries:]
    return torch.cat([_scaled(part, eps, (0, 2)) for part in parts]) * weight


def _scaled(x: torch.Tensor, eps: float, over: tuple[int, ...] = (-1,)) -> torch.Tensor:
    """Divide by the root of the mean square over some dimensions."""
    return x * torch.rsqrt(x.square().mean(over, keepdim=True) + eps)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Apply rotary positions to the first features of heads [n_heads, n_tokens, head_dim]; see `attention`."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = first * cos - second * sin, second * cos + first * sin
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)
