"""Attention over a cache that holds keys and values in the model's type."""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import add_scaled, dot, exp, inline, narrowed, normalise, parallel
from coreinfer_sim.engines.lean.products import linear


@inline
def _rotate(x, cos, sin):
    """Apply rotary position to one head, the halves of its features paired."""
    half = x.shape[0] // 2
    for j in range(half):
        first, second = x[j], x[j + half]
        x[j] = first * cos[j] - second * sin[j]
        x[j + half] = second * cos[j + half] + first * sin[j + half]


@inline
def _attend(query, keys, values, start, end, scaling, scores, out):
    """Softmax attention of one query head over positions start … end of one key head."""
    highest = np.float32(-3.0e38)
    for t in range(start, end):
        scores[t] = dot(keys[t], query) * scaling
        highest = max(highest, scores[t])
    total = np.float32(0.0)
    for t in range(start, end):
        scores[t] = exp(scores[t] - highest)
        total += scores[t]
    for j in range(out.shape[0]):
        out[j] = np.float32(0.0)
    for t in range(start, end):
        add_scaled(scores[t] / total, values[t], out)


@parallel
def attention(
    hidden,
    norm,
    head_norms,
    eps,
    q,
    k,
    v,
    o,
    cos,
    sin,
    keys,
    values,
    rows,
    starts,
    place,
    scaling,
):
    """Add one layer's attention to ``hidden`` [n_rows, d_model] and put the new position into its cache.

    Args:
        hidden: residual stream.
        norm: weight of the norm before, [d_model].
        head_norms: weights of the queries' and keys' own norms, [2, head_dim], or [0, head_dim] if there are none.
        eps: of the norms.
        q: weight, scale and bias; so are k, v and o.
        k: as q.
        v: as q.
        o: as q.
        cos: of each row's position, [n_rows, head_dim].
        sin: as cos.
        keys: cache, [n_batch, n_key_heads, capacity, head_dim].
        values: as keys.
        rows: each row's place in the cache's batch, [n_rows].
        starts: first position of each row that is no padding, [n_rows].
        place: where the new position goes; all before it are attended to.
        scaling: of the scores.
    """
    n_rows, d_model = hidden.shape
    n_keys, head_dim = keys.shape[1], keys.shape[3]
    n_heads = q[0].shape[0] // head_dim
    x = np.empty((n_rows, d_model), np.float32)
    for r in range(n_rows):
        normalise(hidden[r], norm, eps, x[r])
    queries = np.empty((n_rows, q[0].shape[0]), np.float32)
    new_keys = np.empty((n_rows, k[0].shape[0]), np.float32)
    new_values = np.empty((n_rows, v[0].shape[0]), np.float32)
    linear(q[0], q[1], q[2], x, queries)
    linear(k[0], k[1], k[2], x, new_keys)
    linear(v[0], v[1], v[2], x, new_values)
    for r in range(n_rows):
        for head in range(n_keys):
            new = new_keys[r, head * head_dim : (head + 1) * head_dim]
            if head_norms.shape[0] == 2:
                normalise(new, head_norms[1], eps, new)
            _rotate(new, cos[r], sin[r])
            for j in range(head_dim):
                keys[rows[r], head, place, j] = narrowed(keys[rows[r], head, place, j], new[j])
                value = new_values[r, head * head_dim + j]
                values[rows[r], head, place, j] = narrowed(values[rows[r], head, place, j], value)
    mixed = np.empty((n_rows, q[0].shape[0]), np.float32)
    for task in prange(n_rows * n_heads):
        r, head = task // n_heads, task % n_heads
        query = queries[r, head * head_dim : (head + 1) * head_dim]
        if head_norms.shape[0] == 2:
            normalise(query, head_norms[0], eps, query)
        _rotate(query, cos[r], sin[r])
        of = head // (n_heads // n_keys)
        scores = np.empty(place + 1, np.float32)
        out = mixed[r, head * head_dim : (head + 1) * head_dim]
        _attend(query, keys[rows[r], of], values[rows[r], of], starts[r], place + 1, scaling, scores, out)
    linear(o[0], o[1], o[2], mixed, x)
    for r in range(n_rows):
        for j in range(d_model):
            hidden[r, j] += x[r, j]
