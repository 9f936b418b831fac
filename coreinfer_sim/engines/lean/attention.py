"""Attention over a cache that holds keys and values in the model's type."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import (
    address,
    array_at,
    bits,
    centre,
    exp,
    float_name,
    inline,
    narrowed,
    normalise,
    parallel,
    serial,
    tanh,
)
from coreinfer_sim.engines.lean.kernels import (
    call_five,
    call_product,
    call_widened,
    mixed_address,
    product_address,
    widened_address,
)
from coreinfer_sim.engines.lean.products import multiply, rounded, width

OF_NONE, OF_HEADS, OF_CENTRED_HEADS, OF_WIDTH = range(4)
"""Norms of queries and keys: none, RMSNorm or LayerNorm of each head, or RMSNorm over all heads together."""

KEYS, VALUES, CAPACITY, FIRST = range(4)
"""Of a row's cache in one layer: addresses, positions that it has room for, and the position that lies first in it."""

_CHUNK = 64  # positions that one task attends to; widened, they fit into the first-level cache


def cache_loops(dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the addresses of the loops over a cache: products of widened rows, their weighted sums, and what widens them."""
    return product_address("float32", 1), mixed_address("float32"), widened_address(float_name(dtype))


def cache_like(dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Return an array of a cache's type, always of one layout: for another one the loops would be compiled anew."""
    return bits(torch.empty(0, dtype=dtype))


@inline
def _rotate(x, cos, sin, interleaved):
    """Apply rotary positions to the first features of one head, pairs of neighbours or halves of them."""
    half = cos.shape[0]
    if interleaved:
        for j in range(half):
            first, second = x[2 * j], x[2 * j + 1]
            x[2 * j] = first * cos[j] - second * sin[j]
            x[2 * j + 1] = second * cos[j] + first * sin[j]
    else:
        for j in range(half):
            first, second = x[j], x[j + half]
            x[j] = first * cos[j] - second * sin[j]
            x[j + half] = second * cos[j] + first * sin[j]


@inline
def _heads(made, columns, first, kind, norms, eps, out):
    """Set ``out`` [n, head_dim] to some heads of one row of products, normalised; see `attention`."""
    n, head_dim = out.shape
    for head in range(n):
        begin = columns[first + head]
        for j in range(head_dim):
            out[head, j] = made[begin + j]
        if kind == OF_HEADS:
            normalise(out[head], norms[first + head, 0], eps, out[head])
        elif kind == OF_CENTRED_HEADS:
            centre(out[head], norms[first + head, 0], norms[first + head, 1], eps, out[head])
    if kind == OF_WIDTH:
        square = np.float32(0.0)
        for head in range(n):
            for j in range(head_dim):
                square += out[head, j] * out[head, j]
        factor = np.float32(1.0) / np.sqrt(square / np.float32(n * head_dim) + eps)
        for head in range(n):
            for j in range(head_dim):
                out[head, j] *= factor * norms[first + head, 0, j]


@inline
def _weights(query, keys, n, scaling, cap, product, scores):
    """Set ``scores`` to e^(score - highest) of ``n`` keys; return the highest score and the sum."""
    given = (address(query), 0, 0, 0, query.shape[0], n, address(scores), n)
    call_product(product, (address(keys), 0, *given))
    highest = np.float32(-3.0e38)
    if cap > np.float32(0.0):
        for t in range(n):
            scores[t] = cap * tanh(scores[t] * scaling / cap)
            highest = max(highest, scores[t])
    else:
        for t in range(n):
            scores[t] *= scaling
            highest = max(highest, scores[t])
    total = np.float32(0.0)
    for t in range(n):
        scores[t] = exp(scores[t] - highest)
        total += scores[t]
    return highest, total


@parallel
def over_cache(loops, queries, like, caches, n_keys, begins, ends, scaling, cap, out):
    """Softmax attention of every query head over a cache.

    A task takes the query heads that share a key head, so that keys and values are read once for all of them, and some
    positions; parts are joined by their highest scores (https://arxiv.org/abs/2205.14135).

    Args:
        loops: see `cache_loops`.
        queries: float32 [n_rows, n_heads, head_dim], rotated.
        like: an array of the cache's type.
        caches: of each row, see `KEYS`, int64 [n_rows, 4]; keys and values lie as [n_key_heads, capacity, head_dim].
        n_keys: key heads.
        begins: the first place in its cache that each row attends to, [n_rows].
        ends: one past the last one.
        scaling: of the scores.
        cap: softly, of the scores; 0: none.
        out: float32 [n_rows, n_heads, head_dim].
    """
    n_rows, n_heads, head_dim = queries.shape
    longest = 0
    for r in range(n_rows):
        longest = max(longest, ends[r] - begins[r])
    n_shared, n_chunks = n_heads // n_keys, (longest + _CHUNK - 1) // _CHUNK
    parts = np.empty((n_rows, n_heads, n_chunks, head_dim), np.float32)
    weights = np.zeros((n_rows, n_heads, n_chunks, 2), np.float32)  # highest score, and sum
    for task in prange(n_rows * n_keys * n_chunks):
        chunk, r, key = task % n_chunks, task // n_chunks // n_keys, task // n_chunks % n_keys
        first = begins[r] + chunk * _CHUNK
        last = min(ends[r], first + _CHUNK)
        if first < last:
            scores = np.empty((n_shared, _CHUNK), np.float32)
            wide = np.empty((_CHUNK, head_dim), np.float32)  # of all query heads: keys first, values then
            n, shape = (last - first) * head_dim, (n_keys, caches[r, CAPACITY], head_dim)
            keys, values = array_at(caches[r, KEYS], like, shape), array_at(caches[r, VALUES], like, shape)
            call_widened(loops[2], (address(keys[key, first]), n, address(wide)))
            for i in range(n_shared):
                head = key * n_shared + i
                highest, total = _weights(queries[r, head], wide, last - first, scaling, cap, loops[0], scores[i])
                weights[r, head, chunk, 0], weights[r, head, chunk, 1] = highest, total
            call_widened(loops[2], (address(values[key, first]), n, address(wide)))
            for i in range(n_shared):
                into = address(parts[r, key * n_shared + i, chunk])
                call_five(loops[1], (address(wide), address(scores[i]), head_dim, last - first, into))
    for r in range(n_rows):
        for head in range(n_heads):
            _join(parts[r, head], weights[r, head], out[r, head])


@inline
def _join(parts, weights, out):
    """Join what chunks of positions gave one head, [n_chunks, head_dim]."""
    highest = np.float32(-3.0e38)
    for chunk in range(parts.shape[0]):
        if weights[chunk, 1] > np.float32(0.0):
            highest = max(highest, weights[chunk, 0])
    total = np.float32(0.0)
    for j in range(out.shape[0]):
        out[j] = np.float32(0.0)
    for chunk in range(parts.shape[0]):
        if weights[chunk, 1] > np.float32(0.0):
            factor = exp(weights[chunk, 0] - highest)
            total += factor * weights[chunk, 1]
            for j in range(out.shape[0]):
                out[j] += factor * parts[chunk, j]
    for j in range(out.shape[0]):
        out[j] /= total


@serial
def attention(
    loops,
    x,
    stack,
    columns,
    norm_kind,
    norms,
    eps,
    cos,
    sin,
    interleaved,
    like,
    caches,
    n_keys,
    begins,
    ends,
    scaling,
    cap,
    n_threads,
    out,
):
    """Set ``out`` to what one layer's attention gives, and put each row's new position into its cache.

    Args:
        loops: see `cache_loops`.
        x: its inputs, float32 [n_rows, d_model].
        stack: words of q, k, v and o, or of one matrix for the first three, nothing, nothing and o; see `products`.
        columns: where the outputs of each head begin, queries, keys and values one after the other, int64 [n_heads].
        norm_kind: see `OF_NONE`.
        norms: weights and biases of queries and keys, float32 [n_heads, 2, head_dim]; none if they have no norm.
        eps: of those norms.
        cos: of each row's position, float32 [n_rows, half of the features that are rotated]; none: no rotary positions.
        sin: as cos.
        interleaved: whether rotated pairs are neighbours, rather than of two halves.
        like: see `over_cache`.
        caches: see `over_cache`.
        n_keys: key heads.
        begins: see `over_cache`.
        ends: see `over_cache`; the new position is the last one.
        scaling: of the scores.
        cap: softly, of the scores; 0: none.
        n_threads: that products use.
        out: float32 [n_rows, outputs of o, filled up to a multiple of 16].
    """
    n_rows = x.shape[0]
    head_dim = norms.shape[2]
    n_heads = columns.shape[0] - 2 * n_keys
    # 1) queries, keys and values
    codes, factors, sums = rounded(stack[0], x)
    made = np.empty((n_rows, width(stack[0]) + width(stack[1]) + width(stack[2])), np.float32)
    multiply(n_threads, stack[:3], x, codes, factors, sums, made)
    # 2) the new position
    queries = np.empty((n_rows, n_heads, head_dim), np.float32)
    fresh = np.empty((n_keys, head_dim), np.float32)
    for r in range(n_rows):
        _heads(made[r], columns, 0, norm_kind, norms, eps, queries[r])
        _heads(made[r], columns, n_heads, norm_kind, norms, eps, fresh)
        for head in range(n_heads):
            _rotate(queries[r, head], cos[r], sin[r], interleaved)
        shape, place = (n_keys, caches[r, CAPACITY], head_dim), ends[r] - 1
        keys, values = array_at(caches[r, KEYS], like, shape), array_at(caches[r, VALUES], like, shape)
        for head in range(n_keys):
            _rotate(fresh[head], cos[r], sin[r], interleaved)
            first = columns[n_heads + n_keys + head]
            for j in range(head_dim):
                keys[head, place, j] = narrowed(keys[head, place, j], fresh[head, j])
                values[head, place, j] = narrowed(values[head, place, j], made[r, first + j])
    # 3) all positions
    mixed = np.empty((n_rows, n_heads * head_dim), np.float32)
    by_head = mixed.reshape((n_rows, n_heads, head_dim))
    over_cache(loops, queries, like, caches, n_keys, begins, ends, scaling, cap, by_head)
    codes, factors, sums = rounded(stack[3], mixed)
    multiply(n_threads, stack[3:], mixed, codes, factors, sums, out)
