"""What all compiled loops are made of: conversions of stored weights, products and sums of one row, and compilation.

A decode step is bound by the bytes it reads, so weights stay bfloat16, float16 or int8 in memory and are widened to float32
in registers. That also serves processors without instructions for those types. Arrays carry them as bit patterns: uint16
for bfloat16, int16 for float16.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
SILU, RELU, GELU, GELU_TANH, RELU2 = range(5)
"""Activations that the loops know: SiLU, ReLU, GELU by the error function and by its tanh approximation, and ReLU squared."""


@intrinsic
def widened(_context, value):
    """Turn a stored weight into a float32."""
    from llvmlite import ir

    def code(_context, builder, signature, args):
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
def narrowed(_context, like, value):
    """Round a float32 to the type that ``like`` is stored in, to nearest even."""
    from llvmlite import ir

    def code(_context, builder, signature, args):
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
def power_of_two(_context, exponent):
    """Return 2 to a whole int32 between -126 and 127, by its bit pattern."""
    from llvmlite import ir

    def code(_context, builder, _signature, args):
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def float_at(_context, where):
    """Return the float32 at an address."""
    from llvmlite import ir

    def code(_context, builder, _signature, args):
        return builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()))

    return types.float32(types.int64), code


@intrinsic
def _pointer(_context, where, like):
    """Return an address as a pointer to what an array holds."""

    def code(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), code


def _kept_on_disk(**options: Any) -> Any:
    """Compile a function; where there is no place for it on the disk, in every process anew."""

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, fastmath=True, error_model="numpy", **options)(function)

    return compiled


inline: Any = numba.njit(nogil=True, fastmath=True, error_model="numpy", inline="never")
serial: Any = _kept_on_disk()  # but for the loops that it calls
parallel: Any = _kept_on_disk(parallel=True)


@inline
def array_at(where, like, shape):
    """Return the array of a shape, of the type of ``like``, that lies at an address."""
    return carray(_pointer(where, like), shape)


@inline
def address(array):
    """Return where an array begins; numba makes a float of signed and unsigned integers."""
    return np.int64(array.ctypes.data)


@inline
def exp(x):
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
    return (p * x * x + x + np.float32(1.0)) * power_of_two(np.int32(n))


@inline
def tanh(x):
    """Return the hyperbolic tangent to float32 precision (Cephes' tanhf); near 0 a difference of ones would lose it."""
    z = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * z + np.float32(2.06390887954e-2)
    p = p * z - np.float32(5.37397155531e-2)
    p = p * z + np.float32(1.33314422036e-1)
    p = p * z - np.float32(3.33332819422e-1)
    far = np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * x) + np.float32(1.0))
    return p * z * x + x if abs(x) < np.float32(0.625) else far


@inline
def gelu(x):
    """Return x Φ(x), the error function by formula 7.1.26 of Abramowitz and Stegun: its error is below 1.5e-7."""
    z = abs(x) * np.float32(0.70710678)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * z)
    p = np.float32(1.061405429)
    p = p * t - np.float32(1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t - np.float32(0.284496736)
    p = p * t + np.float32(0.254829592)
    rest = p * t * exp(-z * z)  # 1 - erf(z)
    share = rest if x < np.float32(0.0) else np.float32(2.0) - rest
    return np.float32(0.5) * x * share


@inline
def gelu_tanh(x):
    """Return the approximation of GELU by tanh (https://arxiv.org/abs/1606.08415), as x · sigmoid(2 z)."""
    z = np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)
    return x / (np.float32(1.0) + exp(np.float32(-2.0) * z))


@inline
def activated(gate, kind):
    """Return φ of one gate; see `SILU` and the others."""
    if kind == RELU:
        return max(gate, np.float32(0.0))
    if kind == SILU:
        return gate / (np.float32(1.0) + exp(-gate))
    if kind == GELU:
        return gelu(gate)
    if kind == GELU_TANH:
        return gelu_tanh(gate)
    positive = max(gate, np.float32(0.0))
    return positive * positive


@inline
def activate(gates, kind, out):
    """Set ``out`` to φ of all gates [n]: one loop for each kind, so that none is asked for at every gate."""
    n = out.shape[0]
    if kind == SILU:
        for i in range(n):
            out[i] = gates[i] / (np.float32(1.0) + exp(-gates[i]))
    elif kind == RELU:
        for i in range(n):
            out[i] = max(gates[i], np.float32(0.0))
    elif kind == GELU:
        for i in range(n):
            out[i] = gelu(gates[i])
    elif kind == GELU_TANH:
        for i in range(n):
            out[i] = gelu_tanh(gates[i])
    else:
        for i in range(n):
            positive = max(gates[i], np.float32(0.0))
            out[i] = positive * positive


@inline
def normalise(x, weight, eps, out):
    """RMSNorm of one row."""
    square = np.float32(0.0)
    for j in range(x.shape[0]):
        square += x[j] * x[j]
    factor = np.float32(1.0) / np.sqrt(square / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = x[j] * factor * weight[j]


@inline
def centre(x, weight, bias, eps, out):
    """LayerNorm of one row."""
    n = np.float32(x.shape[0])
    total = np.float32(0.0)
    for j in range(x.shape[0]):
        total += x[j]
    mean, square = total / n, np.float32(0.0)
    for j in range(x.shape[0]):
        square += (x[j] - mean) * (x[j] - mean)
    factor = np.float32(1.0) / np.sqrt(square / n + eps)
    for j in range(x.shape[0]):
        out[j] = (x[j] - mean) * factor * weight[j] + bias[j]


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


set_threads()  # else numba would start its threads when a loop is first loaded, and leave torch with as many


_FLOAT_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def float_name(dtype: torch.dtype) -> str:
    """Return what a floating type is called here."""
    return str(dtype).removeprefix("torch.")


def float_type(name: str) -> torch.dtype:
    """Return the floating type of a name."""
    return _FLOAT_TYPES[name]
