"""Gated MLPs: compact ones laid out neuron by neuron, and dense ones as checkpoints hold them."""

from __future__ import annotations

import numpy as np
from numba import prange

from coreinfer_sim.engines.lean.intrinsics import activated, add_scaled, dot, inline, normalise, parallel, serial
from coreinfer_sim.engines.lean.products import linear

_LINE = 32  # features that a gathering task takes at a time; 64 bytes of a 16-bit type


@inline
def _neurons(weight, scale, bias, kind, x, first, last, out):
    """Add what the neurons first … last give to each row of ``out``, reading their weights in the order in which they lie."""
    for i in range(first, last):
        for r in range(x.shape[0]):
            gate = dot(weight[i, 0], x[r]) * scale[i, 0] + bias[i, 0]
            up = dot(weight[i, 1], x[r]) * scale[i, 1] + bias[i, 1]
            add_scaled(activated(gate, kind) * up * scale[i, 2], weight[i, 2], out[r])


@parallel
def neuron_mlp(hidden, rows, norm, eps, weight, scale, bias, out_bias, kind, n_tasks):
    """Add a compact gated MLP, stored neuron by neuron, to some rows of ``hidden`` [n_rows, d_model].

    Args:
        hidden: residual stream.
        rows: which rows, [n].
        norm: weight of the norm before, [d_model].
        eps: of the norm.
        weight: gate row, up row and down column of each neuron, [n_kept, 3, d_model].
        scale: of each of those, [n_kept, 3].
        bias: of gate and up, [n_kept, 2].
        out_bias: [d_model].
        kind: of the activation, SILU or RELU.
        n_tasks: into how many parts the neurons are divided.
    """
    n, d_model, n_kept = rows.shape[0], hidden.shape[1], weight.shape[0]
    x = np.empty((n, d_model), np.float32)
    for r in range(n):
        normalise(hidden[rows[r]], norm, eps, x[r])
    sums = np.zeros((n_tasks, n, d_model), np.float32)
    for task in prange(n_tasks):
        first, last = task * n_kept // n_tasks, (task + 1) * n_kept // n_tasks
        _neurons(weight, scale, bias, kind, x, first, last, sums[task])
    for r in range(n):
        for j in range(d_model):
            total = out_bias[j]
            for task in range(n_tasks):
                total += sums[task, r, j]
            hidden[rows[r], j] += total


@serial
def dense_mlp(hidden, rows, norm, eps, gate, up, down, kind):
    """Add a dense gated MLP, in the layout of checkpoints, to some rows of ``hidden``; see `attention` for the parts."""
    n, d_model, d_ff = rows.shape[0], hidden.shape[1], gate[0].shape[0]
    x = np.empty((n, d_model), np.float32)
    for r in range(n):
        normalise(hidden[rows[r]], norm, eps, x[r])
    gates, ups = np.empty((n, d_ff), np.float32), np.empty((n, d_ff), np.float32)
    linear(gate[0], gate[1], gate[2], x, gates)
    linear(up[0], up[1], up[2], x, ups)
    for r in range(n):
        for i in range(d_ff):
            gates[r, i] = activated(gates[r, i], kind) * ups[r, i]
    linear(down[0], down[1], down[2], gates, x)
    for r in range(n):
        for j in range(d_model):
            hidden[rows[r], j] += x[r, j]


@parallel
def gather_neurons(gate, up, down, ids, out):
    """Put the neurons ``ids`` of a dense MLP side by side: ``out`` [n_kept, 3, d_model], of the weights' own type."""
    n_kept, d_model = ids.shape[0], out.shape[2]
    for i in prange(n_kept):
        out[i, 0] = gate[ids[i]]
        out[i, 1] = up[ids[i]]
    # A cache line of `down` holds one feature of many neurons, so some features are taken through all neurons together.
    for block in prange((d_model + _LINE - 1) // _LINE):
        first, last = block * _LINE, min(d_model, (block + 1) * _LINE)
        for i in range(n_kept):
            for j in range(first, last):
                out[i, 2, j] = down[j, ids[i]]
