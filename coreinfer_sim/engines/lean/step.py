"""One decode step as a single compiled call: all layers, and the output head."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from coreinfer_sim.engines.lean.attention import FIRST, attention
from coreinfer_sim.engines.lean.head import logits_of
from coreinfer_sim.engines.lean.intrinsics import address, centre, normalise, serial
from coreinfer_sim.engines.lean.kernels import call_rows
from coreinfer_sim.engines.lean.products import LOOP, width

NO_NORM, RMS, LAYER = range(3)
"""Norms of the residual stream: none, RMSNorm, LayerNorm."""
BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP = range(4)
"""Where a layer may have norms: of what attention or MLP read, and of what they add."""
N_NORMS = 4


class Layers(NamedTuple):
    """What the loops read of a model's layers; so they decode any model that this describes."""

    norm_kinds: np.ndarray
    """NO_NORM, RMS or LAYER at each place, and last before the head, int64 [n_layers + 1, N_NORMS]."""
    norms: np.ndarray
    """Weights and biases, float32 [n_layers + 1, N_NORMS, 2, d_model]."""
    eps: np.ndarray
    """Of these norms, and of those of queries and keys, float32 [n_layers + 1, N_NORMS + 1]."""
    head_kinds: np.ndarray
    """Of the norms of queries and keys, see `attention.OF_NONE`, int64 [n_layers]."""
    head_norms: np.ndarray
    """See `attention`, float32 [n_layers, n_heads or 0, 2, head_dim]."""
    columns: np.ndarray
    """See `attention`, int64 [n_layers, n_heads]."""
    products: np.ndarray
    """Words of q, k, v and o, see `attention`, int64 [n_layers, 4, N_WORDS]."""
    windows: np.ndarray
    """Latest positions that attention sees, int64 [n_layers]; 0: all."""
    turns: np.ndarray
    """Which table of angles turns queries and keys, int64 [n_layers]."""
    scores: np.ndarray
    """Factor and soft cap of attention scores, float32 [n_layers, 2]; a cap of 0: none."""
    interleaved: int
    """Whether rotated pairs are neighbours."""
    parallel: int
    """Whether the MLP reads the stream as it was before attention."""
    added: np.float32
    """Factor of what attention and MLP add."""
    activation: int
    """Of the MLPs, see `intrinsics`."""


@serial
def _norm_rows(kind, weights, eps, x, out):
    """Set ``out`` to the normalised rows ``x``, or to themselves; both may be one array."""
    d_model = weights.shape[1]
    for r in range(x.shape[0]):
        if kind == RMS:
            normalise(x[r, :d_model], weights[0], eps, out[r, :d_model])
        elif kind == LAYER:
            centre(x[r, :d_model], weights[0], weights[1], eps, out[r, :d_model])
        else:
            for j in range(d_model):
                out[r, j] = x[r, j]


@serial
def _add(hidden, added, factor):
    """Add rows, times a factor, to the residual stream."""
    for r in range(hidden.shape[0]):
        for j in range(hidden.shape[1]):
            hidden[r, j] += factor * added[r, j]


@serial
def _mlps(x, out, layer, stacks, thresholds, n_read, n_of_group, places, kind, n_threads):
    """Set ``out`` to what the MLPs of a layer give, each to its group of rows; see `decode_step`."""
    n_groups, d_model = stacks.shape[0], x.shape[1]
    first = 0
    for group in range(n_groups):
        n, own, made = n_of_group[group], x, out
        if n_groups > 1:
            own, made = np.empty((n, d_model), np.float32), np.empty((n, d_model), np.float32)
            for i in range(n):
                _copy(x[places[first + i]], own[i])
        words = stacks[group, layer]
        of_mlp = (address(words), address(thresholds[group, layer:]), address(n_read[group, layer]))
        call_rows(words[0, LOOP], (address(own), n, d_model, *of_mlp, kind, n_threads, address(made)))
        if n_groups > 1:  # else they are all rows, in order
            for i in range(n):
                _copy(made[i], out[places[first + i]])
        first += n


@serial
def _copy(row, out):
    """Copy a row; numba would compile the message of an assignment's error, which takes it seconds."""
    for j in range(row.shape[0]):
        out[j] = row[j]


@serial
def decode_step(
    loops,
    hidden,
    layers,
    mlps,
    thresholds,
    n_read,
    n_of_group,
    places,
    cos,
    sin,
    like,
    caches,
    n_keys,
    starts,
    positions,
    head,
    head_loops,
    logits,
    n_threads,
):
    """Set ``logits`` from the embeddings of the newest tokens, and put their positions into their caches.

    Returns how many exact rows of the output head were read behind a copy; see `head.logits_of`.

    Args:
        loops: see `attention.cache_loops`.
        hidden: float32 [n_rows, d_model]; it is overwritten.
        layers: see `Layers`.
        mlps: words of each group of rows, among them what reads them, see `mlp_loops`; int64 [n_groups, n_layers, 3, N_WORDS].
        thresholds: of neurons that a token reads, float32 [n_groups, n_layers]; what reads all looks at none.
        n_read: neurons that any row read, and the sum over rows of what each read, are added; see `mlp_loops.N_COUNTS`,
            int64 [n_groups, n_layers, N_COUNTS].
        n_of_group: how many rows each group has.
        places: those rows, group by group.
        cos: of each row's position, float32 [n_tables, n_rows, half of the features that are rotated].
        sin: as cos.
        like: an array of the cache's type.
        caches: of each layer and row, see `attention.KEYS`, int64 [n_layers, n_rows, 4].
        n_keys: key heads.
        starts: first position of each row that is no padding, int64 [n_rows].
        positions: where each row's new position goes, int64 [n_rows].
        head: words of the output head, [1, N_WORDS].
        head_loops: see `head.CoarseHead.loops`.
        logits: float32 [n_rows, vocabulary, filled up to a multiple of 16].
        n_threads: that products use.
    """
    n_layers = layers.products.shape[0]
    x, added = np.empty(hidden.shape, np.float32), np.empty(hidden.shape, np.float32)
    begins, ends = np.empty(starts.shape, np.int64), np.empty(starts.shape, np.int64)
    for layer in range(n_layers):
        kinds, norms, eps = layers.norm_kinds[layer], layers.norms[layer], layers.eps[layer]
        # 1) attention
        for r in range(starts.shape[0]):
            first = caches[layer, r, FIRST]
            ends[r] = positions[r] + 1 - first
            begins[r] = max(0, starts[r] - first)
            if layers.windows[layer] > 0:
                begins[r] = max(begins[r], ends[r] - layers.windows[layer])
        turn, scores = layers.turns[layer], layers.scores[layer]
        made = np.empty((hidden.shape[0], width(layers.products[layer, 3])), np.float32)
        _norm_rows(kinds[BEFORE_ATTENTION], norms[BEFORE_ATTENTION], eps[BEFORE_ATTENTION], hidden, x)
        attention(
            *(loops, x, layers.products[layer], layers.columns[layer]),
            *(
                layers.head_kinds[layer],
                layers.head_norms[layer],
                eps[N_NORMS],
                cos[turn],
                sin[turn],
                layers.interleaved,
            ),
            *(like, caches[layer], n_keys, begins, ends, scores[0], scores[1], n_threads, made),
        )
        _norm_rows(kinds[AFTER_ATTENTION], norms[AFTER_ATTENTION], eps[AFTER_ATTENTION], made, made)
        # 2) MLP
        if not layers.parallel:
            _add(hidden, made, layers.added)
            _norm_rows(kinds[BEFORE_MLP], norms[BEFORE_MLP], eps[BEFORE_MLP], hidden, x)
        elif kinds[BEFORE_MLP] != NO_NORM:
            _norm_rows(kinds[BEFORE_MLP], norms[BEFORE_MLP], eps[BEFORE_MLP], hidden, x)
        _mlps(x, added, layer, mlps, thresholds, n_read, n_of_group, places, layers.activation, n_threads)
        _norm_rows(kinds[AFTER_MLP], norms[AFTER_MLP], eps[AFTER_MLP], added, added)
        if layers.parallel:
            _add(hidden, made, layers.added)
        _add(hidden, added, layers.added)
    _norm_rows(layers.norm_kinds[n_layers, 0], layers.norms[n_layers, 0], layers.eps[n_layers, 0], hidden, x)
    return logits_of(head, head_loops, x, logits, n_threads)
