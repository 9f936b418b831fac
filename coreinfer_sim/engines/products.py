"""Products of a model's own linear layers on a CPU, each by the kernel that was the fastest for its shape on this machine.

No kernel is the fastest everywhere: with one row a bfloat16 matrix may be read at the memory's speed or at a twentieth of
it, depending on the processor, the library's version and the shape. So decode measures the candidates once, on the model's
own weights, for a few milliseconds each, and keeps the answer on disk. The many rows of a prompt go through torch's matrix
product, in float32 where the processor has no instructions for the stored type: widening costs one pass over a weight.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from coreinfer_sim.base.files import cache_folder, write_json
from coreinfer_sim.engines.lean import loops as kernels
from coreinfer_sim.models.loading import DTYPES, usable

_BLOCK = 2**21  # weights that are widened at a time
_MANY = 8  # rows from which a product is no longer bound by reading its weights
_COLD = 64 << 20  # bytes of weights that a measurement reads in turn, so that none of them lie in a cache
_PASSES = 3
_LINEAR = (nn.Linear, FalconLinear)

Shape = tuple[str, int, int]
"""Type of the weights, and the powers of two under n_out and n_in."""
Key = tuple[Shape, int]
"""Shape, and the power of two under the number of rows."""


class _Product:
    """One linear layer's forward code, in place of its own; it holds the weights, but not the layer."""

    def __init__(self, linear: nn.Linear, fastest: Mapping[Key, Kernel]) -> None:
        self.weight, self.bias = linear.weight, linear.bias
        n_out, n_in = self.weight.shape
        self.shape: Shape = _name_of(self.weight.dtype), n_out.bit_length() - 1, n_in.bit_length() - 1
        # A transposed view is left to torch: the loops would be compiled anew for it, and its shape's measurement is another's.
        self._fastest = fastest if self.weight.is_contiguous() else {}
        widen = usable(self.weight.dtype, str(self.weight.device)) is not self.weight.dtype
        self._many = _widened if widen else _torch_linear

    @functools.cached_property
    def arrays(self) -> tuple[Any, Any, Any]:
        """Weight, scale and bias as `decode_kernels.linear` takes them."""
        n_out = len(self.weight)
        bias = np.zeros(n_out, np.float32) if self.bias is None else self.bias.detach().float().numpy()
        return kernels.bits(self.weight), np.ones(n_out, np.float32), bias

    def key(self, n_rows: int) -> Key:
        """Return what decides which kernel is the fastest."""
        return self.shape, n_rows.bit_length() - 1

    def candidates(self, n_rows: int) -> list[str]:
        """Return the names of the kernels that can multiply ``n_rows`` rows, fewer than many."""
        found = ["torch linear"]
        if n_rows == 1:
            found.append("torch mv")
        if self.weight.dtype in DTYPES.values():
            found.append("compiled loops")
        if n_rows > 1 and self.weight.dtype is not torch.float32:
            found.append("torch linear, widened")
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., n_in] to [..., n_out]."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        n_rows = x.numel() // x.shape[-1]
        kernel = self._many if n_rows >= _MANY else self._fastest.get(self.key(n_rows), self._many)
        return kernel(self, x.reshape(n_rows, x.shape[-1])).reshape(*x.shape[:-1], len(self.weight))


Kernel = Callable[[_Product, torch.Tensor], torch.Tensor]
"""Maps ``x`` [n_rows, n_in] to [n_rows, n_out]."""


def _torch_linear(product: _Product, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, product.weight, product.bias)


def _torch_mv(product: _Product, x: torch.Tensor) -> torch.Tensor:
    y = torch.mv(product.weight, x[0]) if product.bias is None else torch.addmv(product.bias, product.weight, x[0])
    return y[None]


def _loops(product: _Product, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), len(product.weight))
    kernels.linear(*product.arrays, x.detach().float().contiguous().numpy(), out.numpy())
    return out.to(x.dtype)


def _widened(product: _Product, x: torch.Tensor) -> torch.Tensor:
    weight, rows = product.weight, x.float()
    out = torch.empty(len(rows), len(weight))
    step = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, len(weight), step):
        torch.mm(rows, weight[begin : begin + step].float().T, out=out[:, begin : begin + step])
    if product.bias is not None:
        out += product.bias
    return out.to(x.dtype)


KERNELS: dict[str, Kernel] = {
    "torch linear": _torch_linear,
    "torch mv": _torch_mv,
    "compiled loops": _loops,
    "torch linear, widened": _widened,
}


class Products:
    """Which kernel multiplies what on this machine."""

    def __init__(self) -> None:
        """Read what was measured before."""
        self._path = cache_folder("products") / f"{_machine_key()}.json"
        self.microseconds = _read(self._path)
        """What a product takes by each kernel that can do it."""
        self._fastest: dict[Key, Kernel] = {}
        self._take()

    def _take(self) -> None:
        for key, found in self.microseconds.items():
            self._fastest[key] = KERNELS[min(found, key=lambda name: found[name])]

    def choose(self, modules: Iterable[nn.Module], n_rows: int) -> None:
        """Measure the candidates for all shapes among ``modules`` for which that was not done yet.

        Args:
            modules: those that are no linear layers on a CPU are passed over.
            n_rows: that will be multiplied at a time.
        """
        if n_rows >= _MANY:
            return
        groups: dict[Key, list[_Product]] = {}
        for module in modules:
            if _is_linear(module) and module.weight.is_contiguous():
                product = _Product(module, self._fastest)
                groups.setdefault(product.key(n_rows), []).append(product)
        unknown = [key for key in groups if key not in self.microseconds]
        if not unknown:
            return
        kernels.set_threads()
        self.microseconds |= {key: _measure(groups[key], n_rows) for key in unknown}
        self._take()
        self._write()

    def use(self, modules: Iterable[nn.Module]) -> list[nn.Linear]:
        """Let linear layers multiply by the fastest kernels from now on; return those that did not before."""
        changed = [module for module in modules if _is_linear(module) and "forward" not in vars(module)]
        for module in changed:
            module.forward = _Product(module, self._fastest)  # type: ignore[assignment, method-assign]
        return changed

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Do so for all linear layers of a model within the block."""
        changed = self.use(model.modules())
        try:
            yield
        finally:
            for module in changed:
                del module.forward

    def _write(self) -> None:
        rows = [{"shape": key[0], "log2_n_rows": key[1], "kernels": of} for key, of in self.microseconds.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"processor": processor(), "microseconds": rows})
        except OSError:
            pass  # then it is measured again the next time


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) in _LINEAR and module.weight.device.type == "cpu"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measure(group: Sequence[_Product], n_rows: int) -> dict[str, float]:
    """Return the microseconds that a product of a group of like layers takes by each candidate."""
    enough = math.ceil(_COLD / max(1, group[0].weight.nbytes))
    used = group[:enough]
    names = [name for name in used[0].candidates(n_rows) if all(name in each.candidates(n_rows) for each in used)]
    inputs = [torch.ones(n_rows, each.weight.shape[1], dtype=each.weight.dtype) for each in used]
    best = dict.fromkeys(names, math.inf)
    with torch.inference_mode():
        for name in names:
            KERNELS[name](used[0], inputs[0])  # compiles
        for _ in range(_PASSES):
            for name in names:
                begin = time.perf_counter()
                for product, x in zip(used, inputs, strict=True):
                    KERNELS[name](product, x)
                best[name] = min(best[name], (time.perf_counter() - begin) / len(used))
    return {name: round(1e6 * seconds, 2) for name, seconds in best.items()}


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _machine_key() -> str:
    """Return a name for everything on which a measurement depends, besides the shapes."""
    facts = processor(), platform.machine(), torch.__version__, numba.__version__, torch.get_num_threads()
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[Key, dict[str, float]]:
    """Return what a file holds; nothing if it cannot be read, as it can be measured again."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["microseconds"]
        found: dict[Key, dict[str, float]] = {}
        for row in rows:
            dtype, n_out, n_in = row["shape"]
            times = {name: float(row["kernels"][name]) for name in KERNELS if name in row["kernels"]}
            if times:
                found[(dtype, n_out, n_in), row["log2_n_rows"]] = times
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found
