"""One decode step as a single compiled call: all layers, and the output head."""

from __future__ import annotations

import numpy as np

from coreinfer_sim.engines.lean.attention import attention
from coreinfer_sim.engines.lean.by_token import mlp_by_token
from coreinfer_sim.engines.lean.head import logits_of
from coreinfer_sim.engines.lean.intrinsics import array_at, normalise, serial
from coreinfer_sim.engines.lean.mlp import gated_mlp
from coreinfer_sim.engines.lean.relu import ZEROS, relu_mlp


@serial
def decode_step(
    loops,
    hidden,
    norms,
    head_norms,
    eps,
    products,
    mlps,
    thresholds,
    n_read,
    n_of_group,
    places,
    cos,
    sin,
    like,
    caches,
    cache_shape,
    rows,
    starts,
    place,
    scaling,
    kind,
    head,
    head_loops,
    logits,
    n_threads,
):
    """Set ``logits`` from the embeddings of the newest tokens, and put their position into the cache.

    Returns how many exact rows of the output head were read behind a copy; see `head.logits_of`.

    Args:
        loops: see `attention.cache_loops`.
        hidden: float32 [n_rows, d_model]; it is overwritten.
        norms: weights of the norms before attention and MLP of each layer, and twice that before the head,
            [n_layers + 1, 2, d_model].
        head_norms: see `attention`, [n_layers, 2 or 0, head_dim].
        eps: of the norms, [n_layers + 1, 2].
        products: words of q, k, v and o, int64 [n_layers, 4, N_WORDS].
        mlps: words of gate, up and down of each group of rows, or those of `by_token` or `relu`, int64
            [n_groups, n_layers, 3, N_WORDS].
        thresholds: of neurons that a token reads, float32 [n_groups, n_layers]; negative: the words are of whole matrices,
            or those of `relu`.
        n_read: see `by_token.mlp_by_token`, int64 [n_groups, n_layers, 2].
        n_of_group: how many rows each group has.
        places: those rows, group by group.
        cos: of each row's position, [n_rows, head_dim].
        sin: as cos.
        like: an array of the cache's type.
        caches: addresses of keys and values of each layer, int64 [n_layers, 2].
        cache_shape: n_batch, n_key_heads, capacity, head_dim.
        rows: each row's place in the cache's batch.
        starts: first position of each row that is no padding.
        place: where the new position goes.
        scaling: of the attention's scores.
        kind: of the activation.
        head: words of the output head, [1, N_WORDS].
        head_loops: see `head.CoarseHead.loops`.
        logits: float32 [n_rows, vocabulary, filled up to a multiple of 16].
        n_threads: that products use.
    """
    n_layers = products.shape[0]
    for layer in range(n_layers):
        keys = array_at(caches[layer, 0], like, cache_shape)
        values = array_at(caches[layer, 1], like, cache_shape)
        attention(
            *(loops, hidden, norms[layer, 0], head_norms[layer], eps[layer, 0], products[layer], cos, sin),
            *(keys, values, rows, starts, place, scaling, n_threads),
        )
        first = 0
        for group in range(mlps.shape[0]):
            last = first + n_of_group[group]
            given = (hidden, places[first:last], norms[layer, 1], eps[layer, 1], mlps[group, layer], kind, n_threads)
            if thresholds[group, layer] == ZEROS:
                relu_mlp(*given, n_read[group, layer])
            elif thresholds[group, layer] < np.float32(0.0):
                gated_mlp(*given)
            else:
                mlp_by_token(*given, thresholds[group, layer], n_read[group, layer])
            first = last
    x = np.empty(hidden.shape, np.float32)
    for r in range(hidden.shape[0]):
        normalise(hidden[r], norms[n_layers, 0], eps[n_layers, 0], x[r])
    return logits_of(head, head_loops, x, logits, n_threads)
