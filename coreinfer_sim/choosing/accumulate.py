"""One compiled loop over the activation site, so that recording core neurons costs little beside the forward pass.

A sort or top-k of every token in every layer would take longer than a small model's forward pass. The loop here finds
the α-quantile by bisection on bit patterns, a dozen vectorised counts over a row that stays in the first-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

_BLOCK = 16384  # counts of a block fit into 16 bits, however wide the layer is

_SMALLEST_SQUARE = np.float32(1.2e-38)  # below it, the reciprocal is infinite


def _compiled(integer: type) -> Callable[..., None]:
    """Build the loop for activations whose bit patterns are of ``integer`` type."""

    @numba.njit(nogil=True, fastmath=True, error_model="numpy")
    def count_block(row, threshold):  # noqa: ANN001, ANN202 - numba infers the types
        count = integer(0)
        for j in range(row.shape[0]):
            count = integer(count + integer(row[j] >= threshold))
        return np.int64(count)

    @numba.njit(nogil=True, fastmath=True, error_model="numpy")
    def count_from(row, threshold):  # noqa: ANN001, ANN202
        total = np.int64(0)
        for begin in range(0, row.shape[0], _BLOCK):
            total += count_block(row[begin : begin + _BLOCK], threshold)
        return total

    @numba.njit(nogil=True, fastmath=True, error_model="numpy")
    def add_core(row, alpha, counts):  # noqa: ANN001, ANN202
        n_positive = count_from(row, integer(1))
        n_core = np.int64(math.ceil(alpha * n_positive - 1e-6))
        if n_core == 0:
            return
        low, high = np.int64(1), np.int64(row.max()) + 1  # count_from(low) >= n_core > count_from(high)
        n_low = n_positive
        while high - low > 1 and n_low != n_core:
            middle = (low + high) >> 1
            n_middle = count_from(row, integer(middle))
            if n_middle >= n_core:
                low, n_low = middle, n_middle
            else:
                high = middle
        threshold = integer(low)
        if n_low == n_core:
            for j in range(row.shape[0]):
                counts[j] += np.int32(row[j] >= threshold)
            return
        left = n_core
        for j in range(row.shape[0]):
            counts[j] += np.int32(row[j] > threshold)
        left -= count_from(row, integer(low + 1))
        for j in range(row.shape[0]):
            if row[j] == threshold:
                counts[j] += np.int32(1)
                left -= 1
                if left == 0:
                    break

    @numba.njit(nogil=True, fastmath=True, error_model="numpy")
    def add_energy(row, energy, activation):  # noqa: ANN001, ANN202
        square = np.float32(0)
        for j in range(row.shape[0]):
            square += row[j] * row[j]
        scale = np.float32(1) / square if square > _SMALLEST_SQUARE else np.float32(0)
        for j in range(row.shape[0]):
            energy[j] += row[j] * row[j] * scale
        for j in range(row.shape[0]):
            activation[j] += max(row[j], np.float32(0))

    @numba.njit(nogil=True)
    def loop(z, bits, starts, alpha, counts, energy, activation):  # noqa: ANN001, ANN202
        widened = np.empty(bits.shape[1], np.int32)
        for sentence in range(starts.shape[0] - 1):
            for token in range(starts[sentence], starts[sentence + 1]):
                row = bits[token]
                add_core(row, alpha, counts[sentence])
                if z.shape[0] > 0:
                    add_energy(z[token], energy[sentence], activation[sentence])
                else:
                    for j in range(row.shape[0]):
                        widened[j] = np.int32(row[j]) << np.int32(16)
                    add_energy(widened.view(np.float32), energy[sentence], activation[sentence])

    return loop


_LOOPS: dict[type, Callable[..., None]] = {np.int16: _compiled(np.int16), np.int32: _compiled(np.int32)}


def accumulate(
    z: torch.Tensor, starts: np.ndarray, alpha: float, counts: np.ndarray, energy: np.ndarray, activation: np.ndarray
) -> None:
    """Add every sentence's statistics to ``counts``, ``energy`` and ``activation``, each [n_sentences, d_ff].

    Args:
        z: activations on the CPU, [n_tokens, d_ff].
        starts: where each sentence begins, and the total, [n_sentences + 1].
        alpha: share of the positive entries that makes a token's core neurons.
        counts: int32 sums.
        energy: float32 sums.
        activation: float32 sums.
    """
    # The bit pattern of a positive float orders like the float, so integers find the α-quantile; sixteen bits hold
    # twice the lanes of thirty-two. A bfloat16 is the upper half of a float32, so the loop widens it by itself.
    bits = z.view(torch.int16 if z.element_size() == 2 else torch.int32).numpy()
    values = np.empty((0, z.shape[1]), np.float32) if z.dtype == torch.bfloat16 else z.float().numpy()
    loop = _LOOPS[bits.dtype.type]
    n_threads = min(torch.get_num_threads(), len(starts) - 1)
    cuts = np.linspace(0, len(starts) - 1, n_threads + 1).astype(int)

    def part(begin: int, end: int) -> None:
        own = (array[begin:end] for array in (counts, energy, activation))
        loop(values, bits, starts[begin : end + 1], alpha, *own)

    if n_threads == 1:
        part(0, len(starts) - 1)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(part, cuts[:-1], cuts[1:]))
