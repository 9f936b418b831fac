"""Attention over a cache that holds keys and values in the model's type."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import (
    address,
    exp,
    float_name,
    inline,
    narrowed,
    normalise,
    parallel,
    serial,
)
from coreinfer_sim.engines.lean.kernels import (
    call_five,
    call_product,
    call_widened,
    mixed_address,
    product_address,
    widened_address,
)
from coreinfer_sim.engines.lean.products import N_OUT, multiply, rounded, width

_CHUNK = 64  # positions that one task attends to; widened, they fit into the first-level cache


def cache_loops(dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the addresses of the loops over a cache: products of widened rows, their weighted sums, and what widens them."""
    return product_address("float32", 1), mixed_address("float32"), widened_address(float_name(dtype))


@inline
def _rotate(x, cos, sin):
    """Apply rotary position to one head, the halves of its features paired."""
    half = x.shape[0] // 2
    for j in range(half):
        first, second = x[j], x[j + half]
        x[j] = first * cos[j] - second * sin[j]
        x[j + half] = second * cos[j + half] + first * sin[j + half]


@inline
def _weights(query, keys, n, scaling, product, scores):
    """Set ``scores`` to e^(score - highest) of ``n`` keys; return the highest score and the sum."""
    given = (address(query), 0, 0, 0, query.shape[0], n, address(scores), n)
    call_product(product, (address(keys), 0, *given))
    highest = np.float32(-3.0e38)
    for t in range(n):
        scores[t] *= scaling
        highest = max(highest, scores[t])
    total = np.float32(0.0)
    for t in range(n):
        scores[t] = exp(scores[t] - highest)
        total += scores[t]
    return highest, total


@parallel
def over_cache(loops, queries, keys, values, rows, starts, end, scaling, out):
    """Softmax attention of every query head over a cache.

    A task takes the query heads that share a key head, so that keys and values are read once for all of them, and some
    positions; parts are joined by their highest scores (https://arxiv.org/abs/2205.14135).

    Args:
        loops: see `cache_loops`.
        queries: float32 [n_rows, n_heads, head_dim], rotated.
        keys: cache, [n_batch, n_key_heads, capacity, head_dim].
        values: as keys.
        rows: each row's place in the cache's batch, [n_rows].
        starts: first position of each row that is no padding, [n_rows].
        end: one past the last position.
        scaling: of the scores.
        out: float32 [n_rows, n_heads, head_dim].
    """
    n_rows, n_heads, head_dim = queries.shape
    n_keys = keys.shape[1]
    n_shared, n_chunks = n_heads // n_keys, (end + _CHUNK - 1) // _CHUNK
    parts = np.empty((n_rows, n_heads, n_chunks, head_dim), np.float32)
    weights = np.zeros((n_rows, n_heads, n_chunks, 2), np.float32)  # highest score, and sum
    for task in prange(n_rows * n_keys * n_chunks):
        chunk, r, key = task % n_chunks, task // n_chunks // n_keys, task // n_chunks % n_keys
        first, last = max(starts[r], chunk * _CHUNK), min(end, (chunk + 1) * _CHUNK)
        if first < last:
            scores = np.empty((n_shared, _CHUNK), np.float32)
            wide = np.empty((_CHUNK, head_dim), np.float32)  # of all query heads: keys first, values then
            n, own = (last - first) * head_dim, rows[r]
            call_widened(loops[2], (address(keys[own, key, first]), n, address(wide)))
            for i in range(n_shared):
                head = key * n_shared + i
                highest, total = _weights(queries[r, head], wide, last - first, scaling, loops[0], scores[i])
                weights[r, head, chunk, 0], weights[r, head, chunk, 1] = highest, total
            call_widened(loops[2], (address(values[own, key, first]), n, address(wide)))
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
    hidden,
    norm,
    head_norms,
    eps,
    stack,
    cos,
    sin,
    keys,
    values,
    rows,
    starts,
    place,
    scaling,
    n_threads,
):
    """Add one layer's attention to ``hidden`` [n_rows, d_model] and put the new position into its cache.

    Args:
        loops: see `cache_loops`.
        hidden: residual stream.
        norm: weight of the norm before, [d_model].
        head_norms: weights of the queries' and keys' own norms, [2, head_dim], or [0, head_dim] if there are none.
        eps: of the norms.
        stack: words of q, k, v and o; see `products`.
        cos: of each row's position, [n_rows, head_dim].
        sin: as cos.
        keys: cache, [n_batch, n_key_heads, capacity, head_dim].
        values: as keys.
        rows: each row's place in the cache's batch, [n_rows].
        starts: first position of each row that is no padding, [n_rows].
        place: where the new position goes; all before it are attended to.
        scaling: of the scores.
        n_threads: that products use.
    """
    n_rows, d_model = hidden.shape
    n_keys, head_dim = keys.shape[1], keys.shape[3]
    n_heads = stack[0, N_OUT] // head_dim
    # 1) queries, keys and values
    x = np.empty((n_rows, d_model), np.float32)
    for r in range(n_rows):
        normalise(hidden[r], norm, eps, x[r])
    codes, factors, sums = rounded(stack[0], x)
    first_key = width(stack[0])
    first_value = first_key + width(stack[1])
    made = np.empty((n_rows, first_value + width(stack[2])), np.float32)
    multiply(n_threads, stack[:3], x, codes, factors, sums, made)
    # 2) the new position
    queries = np.empty((n_rows, n_heads, head_dim), np.float32)
    for r in range(n_rows):
        for head in range(n_heads):
            queries[r, head] = made[r, head * head_dim : (head + 1) * head_dim]
            if head_norms.shape[0] == 2:
                normalise(queries[r, head], head_norms[0], eps, queries[r, head])
            _rotate(queries[r, head], cos[r], sin[r])
        for head in range(n_keys):
            new = made[r, first_key + head * head_dim : first_key + (head + 1) * head_dim]
            if head_norms.shape[0] == 2:
                normalise(new, head_norms[1], eps, new)
            _rotate(new, cos[r], sin[r])
            for j in range(head_dim):
                keys[rows[r], head, place, j] = narrowed(keys[rows[r], head, place, j], new[j])
                value = made[r, first_value + head * head_dim + j]
                values[rows[r], head, place, j] = narrowed(values[rows[r], head, place, j], value)
    # 3) all positions
    mixed = np.empty((n_rows, n_heads * head_dim), np.float32)
    over_cache(
        *(loops, queries, keys, values, rows, starts, place + 1, scaling, mixed.reshape((n_rows, n_heads, head_dim)))
    )
    codes, factors, sums = rounded(stack[3], mixed)
    added = np.empty((n_rows, width(stack[3])), np.float32)
    multiply(n_threads, stack[3:], mixed, codes, factors, sums, added)
    for r in range(n_rows):
        for j in range(d_model):
            hidden[r, j] += added[r, j]
