"""Compiled loops for decode on a CPU: each reads every weight once, in its stored type, and computes in float32.

A decode step is bound by the bytes it reads, so weights stay bfloat16, float16 or int8 in memory and are widened in
registers. That also serves processors without instructions for those types. Arrays carry them as bit patterns: uint16
for bfloat16, int16 for float16.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic

_ROWS = 8  # output features that one task of a product computes
_FEW = 3  # rows up to which a product is bound by reading its weights
_LINE = 32  # features that a gathering task takes at a time; 64 bytes of a 16-bit type
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
SILU, RELU = 0, 1


@intrinsic
def _widened(_context, value):  # noqa: ANN001, ANN202 - numba's own calling convention
    """Turn a stored weight into a float32."""
    from llvmlite import ir

    def code(_context, builder, signature, args):  # noqa: ANN001, ANN202
        (stored,) = args
        kind = signature.args[0]
        if kind == types.float32:
            return stored
        if kind == types.int8:
            return builder.sitofp(stored, ir.FloatType())
        if kind == types.int16:  # float16
            return builder.fpext(builder.bitcast(stored, ir.HalfType()), ir.FloatType())
        bits = builder.shl(builder.zext(stored, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), code


@intrinsic
def _narrowed(_context, like, value):  # noqa: ANN001, ANN202
    """Round a float32 to the type that ``like`` is stored in, to nearest even."""
    from llvmlite import ir

    def code(_context, builder, signature, args):  # noqa: ANN001, ANN202
        number = args[1]
        kind = signature.args[0]
        if kind == types.float32:
            return number
        if kind == types.int16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(number, word)
        last = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(last, ir.Constant(word, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like(like, value), code


@intrinsic
def _power_of_two(_context, exponent):  # noqa: ANN001, ANN202
    """Return 2 to a whole int32 between -126 and 127, by its bit pattern."""
    from llvmlite import ir

    def code(_context, builder, _signature, args):  # noqa: ANN001, ANN202
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), code


def _kept_on_disk(**options: Any) -> Any:
    """Compile a function; where there is no place for it on the disk, in every process anew."""

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, fastmath=True, error_model="numpy", **options)(function)

    return compiled


_inline: Any = numba.njit(nogil=True, fastmath=True, error_model="numpy", inline="never")
_serial: Any = _kept_on_disk()  # but for the loops that it calls
_parallel: Any = _kept_on_disk(parallel=True)


@_inline
def _exp(x):  # noqa: ANN001, ANN202
    """Return e^x to float32 precision (Cephes' expf), in a form that compilers vectorise."""
    x = min(max(x, np.float32(-87.0)), np.float32(87.0))
    n = np.floor(x * _LOG2E + np.float32(0.5))
    x = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * x + np.float32(1.3981999507e-3)
    p = p * x + np.float32(8.3334519073e-3)
    p = p * x + np.float32(4.1665795894e-2)
    p = p * x + np.float32(1.6666665459e-1)
    p = p * x + np.float32(5.0000001201e-1)
    return (p * x * x + x + np.float32(1.0)) * _power_of_two(np.int32(n))


@_inline
def _activated(gate, kind):  # noqa: ANN001, ANN202
    if kind == RELU:
        return max(gate, np.float32(0.0))
    return gate / (np.float32(1.0) + _exp(-gate))


@_inline
def _dot(row, x):  # noqa: ANN001, ANN202
    total = np.float32(0.0)
    for j in range(x.shape[0]):
        total += _widened(row[j]) * x[j]
    return total


@_inline
def _dot_of_two(row, x, b):  # noqa: ANN001, ANN202
    """Multiply one stored row with two rows of ``x`` from ``b`` on; each weight is widened once, in a register."""
    t0, t1 = np.float32(0.0), np.float32(0.0)
    for j in range(row.shape[0]):
        weight = _widened(row[j])
        t0 += weight * x[b, j]
        t1 += weight * x[b + 1, j]
    return t0, t1


@_inline
def _two_dots_of_two(first, second, x, b):  # noqa: ANN001, ANN202
    """Multiply two stored rows with two rows of ``x`` from ``b`` on."""
    f0, f1, s0, s1 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in range(first.shape[0]):
        w, v = _widened(first[j]), _widened(second[j])
        f0 += w * x[b, j]
        f1 += w * x[b + 1, j]
        s0 += v * x[b, j]
        s1 += v * x[b + 1, j]
    return f0, f1, s0, s1


@_inline
def _two_dots_of_four(first, second, x, b):  # noqa: ANN001, ANN202
    """Do the same with four rows of ``x``: eight sums are what registers hold."""
    f0, f1, f2, f3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    s0, s1, s2, s3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for j in range(first.shape[0]):
        w, v = _widened(first[j]), _widened(second[j])
        f0 += w * x[b, j]
        f1 += w * x[b + 1, j]
        f2 += w * x[b + 2, j]
        f3 += w * x[b + 3, j]
        s0 += v * x[b, j]
        s1 += v * x[b + 1, j]
        s2 += v * x[b + 2, j]
        s3 += v * x[b + 3, j]
    return f0, f1, f2, f3, s0, s1, s2, s3


@_inline
def _add_scaled(factor, row, out):  # noqa: ANN001, ANN202
    for j in range(out.shape[0]):
        out[j] += factor * _widened(row[j])


@_inline
def _dots_in_order(row, x, scale, bias, out, i):  # noqa: ANN001, ANN202
    """Set ``out[b, i]`` for every row b of ``x``, few of them, to its product with one stored row."""
    n, b = x.shape[0], 0
    while b + 2 <= n:
        t0, t1 = _dot_of_two(row, x, b)
        out[b, i], out[b + 1, i] = t0 * scale + bias, t1 * scale + bias
        b += 2
    if b < n:
        out[b, i] = _dot(row, x[b]) * scale + bias


@_inline
def _two_dots(first, second, x, scales, biases, out, i):  # noqa: ANN001, ANN202
    """Set ``out[b, i]`` and ``out[b, i + 1]`` for every row b of ``x`` to its products with two stored rows.

    ``scales`` and ``biases`` [2] are theirs.
    """
    n, b = x.shape[0], 0
    while b + 4 <= n:
        f0, f1, f2, f3, s0, s1, s2, s3 = _two_dots_of_four(first, second, x, b)
        out[b, i], out[b, i + 1] = f0 * scales[0] + biases[0], s0 * scales[1] + biases[1]
        out[b + 1, i], out[b + 1, i + 1] = f1 * scales[0] + biases[0], s1 * scales[1] + biases[1]
        out[b + 2, i], out[b + 2, i + 1] = f2 * scales[0] + biases[0], s2 * scales[1] + biases[1]
        out[b + 3, i], out[b + 3, i + 1] = f3 * scales[0] + biases[0], s3 * scales[1] + biases[1]
        b += 4
    while b + 2 <= n:
        f0, f1, s0, s1 = _two_dots_of_two(first, second, x, b)
        out[b, i], out[b, i + 1] = f0 * scales[0] + biases[0], s0 * scales[1] + biases[1]
        out[b + 1, i], out[b + 1, i + 1] = f1 * scales[0] + biases[0], s1 * scales[1] + biases[1]
        b += 2
    if b < n:
        out[b, i] = _dot(first, x[b]) * scales[0] + biases[0]
        out[b, i + 1] = _dot(second, x[b]) * scales[1] + biases[1]


@_inline
def _normalise(x, weight, eps, out):  # noqa: ANN001, ANN202
    """RMSNorm of one row."""
    square = np.float32(0.0)
    for j in range(x.shape[0]):
        square += x[j] * x[j]
    factor = np.float32(1.0) / np.sqrt(square / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = x[j] * factor * weight[j]


@_parallel
def linear(weight, scale, bias, x, out):  # noqa: ANN001, ANN201
    """Set ``out`` [n_rows, n_out] to ``x`` [n_rows, n_in] times ``weight`` [n_out, n_in], scaled and shifted by row."""
    n_out, n_in = weight.shape
    for task in prange((n_out + _ROWS - 1) // _ROWS):
        first, last = task * _ROWS, min(n_out, (task + 1) * _ROWS)
        i = first
        if x.shape[0] == 1:  # what every token goes through, without a call more for each row of weights
            while i < last:
                out[0, i] = _dot(weight[i], x[0]) * scale[i] + bias[i]
                i += 1
        while x.shape[0] > _FEW and i + 2 <= last:
            _two_dots(weight[i], weight[i + 1], x, scale[i : i + 2], bias[i : i + 2], out, i)
            i += 2
        while i < last:
            _dots_in_order(weight[i], x, scale[i], bias[i], out, i)
            i += 1


@_inline
def _rotate(x, cos, sin):  # noqa: ANN001, ANN202
    """Apply rotary position to one head, the halves of its features paired."""
    half = x.shape[0] // 2
    for j in range(half):
        first, second = x[j], x[j + half]
        x[j] = first * cos[j] - second * sin[j]
        x[j + half] = second * cos[j + half] + first * sin[j + half]


@_inline
def _attend(query, keys, values, start, end, scaling, scores, out):  # noqa: ANN001, ANN202
    """Softmax attention of one query head over positions start … end of one key head."""
    highest = np.float32(-3.0e38)
    for t in range(start, end):
        scores[t] = _dot(keys[t], query) * scaling
        highest = max(highest, scores[t])
    total = np.float32(0.0)
    for t in range(start, end):
        scores[t] = _exp(scores[t] - highest)
        total += scores[t]
    for j in range(out.shape[0]):
        out[j] = np.float32(0.0)
    for t in range(start, end):
        _add_scaled(scores[t] / total, values[t], out)


@_parallel
def attention(  # noqa: ANN201, PLR0913
    hidden,  # noqa: ANN001
    norm,  # noqa: ANN001
    head_norms,  # noqa: ANN001
    eps,  # noqa: ANN001
    q,  # noqa: ANN001
    k,  # noqa: ANN001
    v,  # noqa: ANN001
    o,  # noqa: ANN001
    cos,  # noqa: ANN001
    sin,  # noqa: ANN001
    keys,  # noqa: ANN001
    values,  # noqa: ANN001
    rows,  # noqa: ANN001
    starts,  # noqa: ANN001
    place,  # noqa: ANN001
    scaling,  # noqa: ANN001
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
        _normalise(hidden[r], norm, eps, x[r])
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
                _normalise(new, head_norms[1], eps, new)
            _rotate(new, cos[r], sin[r])
            for j in range(head_dim):
                keys[rows[r], head, place, j] = _narrowed(keys[rows[r], head, place, j], new[j])
                value = new_values[r, head * head_dim + j]
                values[rows[r], head, place, j] = _narrowed(values[rows[r], head, place, j], value)
    mixed = np.empty((n_rows, q[0].shape[0]), np.float32)
    for task in prange(n_rows * n_heads):
        r, head = task // n_heads, task % n_heads
        query = queries[r, head * head_dim : (head + 1) * head_dim]
        if head_norms.shape[0] == 2:
            _normalise(query, head_norms[0], eps, query)
        _rotate(query, cos[r], sin[r])
        of = head // (n_heads // n_keys)
        scores = np.empty(place + 1, np.float32)
        out = mixed[r, head * head_dim : (head + 1) * head_dim]
        _attend(query, keys[rows[r], of], values[rows[r], of], starts[r], place + 1, scaling, scores, out)
    linear(o[0], o[1], o[2], mixed, x)
    for r in range(n_rows):
        for j in range(d_model):
            hidden[r, j] += x[r, j]


@_inline
def _add_four(weight, begin, last, factors, out, r):  # noqa: ANN001, ANN202
    """Add the columns of four neurons from ``begin`` on, scaled by ``factors[r]``, to row r of ``out``.

    Those past ``last`` have the factor zero. ``out`` is read and written once for all four.
    """
    w0, w1 = weight[begin, 2], weight[min(begin + 1, last - 1), 2]
    w2, w3 = weight[min(begin + 2, last - 1), 2], weight[min(begin + 3, last - 1), 2]
    a0, a1, a2, a3 = factors[r, 0], factors[r, 1], factors[r, 2], factors[r, 3]
    row = out[r]
    for j in range(row.shape[0]):
        row[j] = row[j] + a0 * _widened(w0[j]) + a1 * _widened(w1[j]) + a2 * _widened(w2[j]) + a3 * _widened(w3[j])


@_inline
def _add_four_to_two(weight, begin, last, factors, out, r):  # noqa: ANN001, ANN202
    """Do the same for the rows r and r + 1, so that the columns are widened once for both."""
    w0, w1 = weight[begin, 2], weight[min(begin + 1, last - 1), 2]
    w2, w3 = weight[min(begin + 2, last - 1), 2], weight[min(begin + 3, last - 1), 2]
    a0, a1, a2, a3 = factors[r, 0], factors[r, 1], factors[r, 2], factors[r, 3]
    b0, b1, b2, b3 = factors[r + 1, 0], factors[r + 1, 1], factors[r + 1, 2], factors[r + 1, 3]
    first, second = out[r], out[r + 1]
    for j in range(first.shape[0]):
        v0, v1, v2, v3 = _widened(w0[j]), _widened(w1[j]), _widened(w2[j]), _widened(w3[j])
        first[j] = first[j] + a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
        second[j] = second[j] + b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3


@_inline
def _add_scaled_to_two(f0, f1, row, first, second):  # noqa: ANN001, ANN202
    for j in range(first.shape[0]):
        weight = _widened(row[j])
        first[j] += f0 * weight
        second[j] += f1 * weight


@_inline
def _neurons_of_one(weight, scale, bias, kind, x, first, last, out):  # noqa: ANN001, ANN202
    """Add what the neurons first … last give for one row, reading their weights in the order in which they lie."""
    for i in range(first, last):
        gate = _dot(weight[i, 0], x) * scale[i, 0] + bias[i, 0]
        up = _dot(weight[i, 1], x) * scale[i, 1] + bias[i, 1]
        _add_scaled(_activated(gate, kind) * up * scale[i, 2], weight[i, 2], out)


@_inline
def _neurons_in_order(weight, scale, bias, kind, x, first, last, out):  # noqa: ANN001, ANN202
    """Do the same for few rows: that order is what memory is read fastest in.

    Many rows are bound by arithmetic, and take several neurons at a time.
    """
    n_rows = x.shape[0]
    parts = np.empty((n_rows, 2), np.float32)
    for i in range(first, last):
        _dots_in_order(weight[i, 0], x, scale[i, 0], bias[i, 0], parts, 0)
        _dots_in_order(weight[i, 1], x, scale[i, 1], bias[i, 1], parts, 1)
        for r in range(n_rows):
            parts[r, 0] = _activated(parts[r, 0], kind) * parts[r, 1] * scale[i, 2]
        r = 0
        while r + 2 <= n_rows:
            _add_scaled_to_two(parts[r, 0], parts[r + 1, 0], weight[i, 2], out[r], out[r + 1])
            r += 2
        if r < n_rows:
            _add_scaled(parts[r, 0], weight[i, 2], out[r])


@_inline
def _neurons_of_many(weight, scale, bias, kind, x, first, last, out):  # noqa: ANN001, ANN202
    """Add what the neurons first … last give for several rows, four neurons at a time."""
    n_rows = x.shape[0]
    parts, factors = np.empty((n_rows, 2), np.float32), np.zeros((n_rows, 4), np.float32)
    for begin in range(first, last, 4):
        for i in range(4):
            of = begin + i
            if of >= last:
                factors[:, i] = np.float32(0)
                continue
            _two_dots(weight[of, 0], weight[of, 1], x, scale[of], bias[of], parts, 0)
            for r in range(n_rows):
                factors[r, i] = _activated(parts[r, 0], kind) * parts[r, 1] * scale[of, 2]
        r = 0
        while r + 2 <= n_rows:
            _add_four_to_two(weight, begin, last, factors, out, r)
            r += 2
        if r < n_rows:
            _add_four(weight, begin, last, factors, out, r)


@_parallel
def neuron_mlp(hidden, rows, norm, eps, weight, scale, bias, out_bias, kind, n_tasks):  # noqa: ANN001, ANN201
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
        _normalise(hidden[rows[r]], norm, eps, x[r])
    sums = np.zeros((n_tasks, n, d_model), np.float32)
    for task in prange(n_tasks):
        first, last = task * n_kept // n_tasks, (task + 1) * n_kept // n_tasks
        if n == 1:
            _neurons_of_one(weight, scale, bias, kind, x[0], first, last, sums[task, 0])
        elif n <= _FEW:
            _neurons_in_order(weight, scale, bias, kind, x, first, last, sums[task])
        else:
            _neurons_of_many(weight, scale, bias, kind, x, first, last, sums[task])
    for r in range(n):
        for j in range(d_model):
            total = out_bias[j]
            for task in range(n_tasks):
                total += sums[task, r, j]
            hidden[rows[r], j] += total


@_serial
def dense_mlp(hidden, rows, norm, eps, gate, up, down, kind):  # noqa: ANN001, ANN201
    """Add a dense gated MLP, in the layout of checkpoints, to some rows of ``hidden``; see `attention` for the parts."""
    n, d_model, d_ff = rows.shape[0], hidden.shape[1], gate[0].shape[0]
    x = np.empty((n, d_model), np.float32)
    for r in range(n):
        _normalise(hidden[rows[r]], norm, eps, x[r])
    gates, ups = np.empty((n, d_ff), np.float32), np.empty((n, d_ff), np.float32)
    linear(gate[0], gate[1], gate[2], x, gates)
    linear(up[0], up[1], up[2], x, ups)
    for r in range(n):
        for i in range(d_ff):
            gates[r, i] = _activated(gates[r, i], kind) * ups[r, i]
    linear(down[0], down[1], down[2], gates, x)
    for r in range(n):
        for j in range(d_model):
            hidden[rows[r], j] += x[r, j]


@_serial
def output(hidden, norm, eps, weight, scale, bias, logits):  # noqa: ANN001, ANN201
    """Set ``logits`` [n_rows, vocabulary] from the residual stream; see `linear`."""
    x = np.empty(hidden.shape, np.float32)
    for r in range(hidden.shape[0]):
        _normalise(hidden[r], norm, eps, x[r])
    linear(weight, scale, bias, x, logits)


@_parallel
def gather_neurons(gate, up, down, ids, out):  # noqa: ANN001, ANN201
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


_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a contiguous CPU tensor's memory as the array that the loops take."""
    return tensor.detach().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()


def set_threads() -> int:
    """Let the loops use as many threads as torch does, and return how many."""
    n = torch.get_num_threads()
    numba.set_num_threads(min(n, _MOST_THREADS))
    if torch.get_num_threads() != n:  # numba starts its threads with OpenMP's number, which is torch's too
        torch.set_num_threads(n)
    return n


@functools.cache
def warm_up_linear(dtype: torch.dtype) -> None:
    """Compile `linear` alone for weights of a type, or load it where that was done before."""
    one = np.ones(8, np.float32)
    set_threads()
    linear(bits(torch.zeros(8, 8, dtype=dtype)), one, one, np.ones((1, 8), np.float32), np.ones((1, 8), np.float32))


@functools.cache
def warm_up(dtype: torch.dtype, int8: bool = False) -> None:
    """Compile the loops for a model's type, or load them where that was done before: some 20 seconds or one.

    Args:
        dtype: of the cache and, unless they are int8, of the weights.
        int8: whether the weights are.
    """
    held = torch.int8 if int8 else dtype
    one, rows, eps = np.ones(8, np.float32), np.zeros(1, np.int64), np.float32(1e-6)
    hidden, product = np.ones((1, 8), np.float32), (bits(torch.zeros(8, 8, dtype=held)), one, one)
    keys, values = (bits(torch.zeros(1, 1, 1, 8, dtype=dtype)) for _ in range(2))
    nothing = np.zeros((0, 8), np.float32)
    set_threads()
    attention(
        *(hidden, one, nothing, eps, product, product, product, product, hidden.copy(), hidden.copy()),
        *(keys, values, rows, rows, 0, np.float32(1)),
    )
    neurons = bits(torch.zeros(4, 3, 8, dtype=held)), np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    neuron_mlp(hidden, rows, one, eps, *neurons, one, SILU, 1)
    dense_mlp(hidden, rows, one, eps, product, product, product, SILU)
    output(hidden, one, eps, *product, hidden.copy())
