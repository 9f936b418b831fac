"""Tensors of a Llama-like model's GGUF file under the names of the model's own parameters, one of which is read at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from coreinfer_sim.models.gguf_codes import QuantisedTensor, module_of, order_of, own_codes, stored_dtype

_ROWS = 4096  # that are dequantised at a time


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """Where a tensor lies."""

    shape: tuple[int, ...]
    kind: Any
    """ggml's type."""
    raw: Any
    """In the file's memory map."""
    order: Any = None
    """Which of the file's rows each output is; None: they are in order."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it is read."""
        return stored_dtype(self.kind.name)


class GGUFCheckpoint:
    """The tensors of a GGUF file, as `parameters.Tensors`."""

    def __init__(self, path: str, config: Any) -> None:
        """Look at the header of a file whose configuration is given."""
        self.tensors: dict[str, GGUFTensor] = {}
        self.names: set[str] = set()
        for tensor in gguf.GGUFReader(path).tensors:
            parts = str(tensor.name).split(".")
            module = module_of(parts)
            name = str(tensor.name) if module is None else f"{module}.{parts[-1]}"
            self.names.add(name)
            if module is not None:
                shape = tuple(int(n) for n in reversed(tensor.shape))
                order = order_of(parts, shape[0], config)
                self.tensors[name] = GGUFTensor(shape, tensor.tensor_type, tensor.data, order)
        self.codes: dict[str, QuantisedTensor] = own_codes(path, config)
        """Matrices whose codes can be taken as they are, by the modules' names."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a whole tensor, dequantised."""
        tensor = self.tensors[name]
        out = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        for begin in range(0, len(out), _ROWS):
            part = slice(begin, begin + _ROWS)
            rows = tensor.raw[part] if tensor.order is None else tensor.raw[tensor.order[part]]
            values: np.ndarray[Any, Any] = gguf.quants.dequantize(rows, tensor.kind)
            out[part] = torch.from_numpy(values.astype(np.float32)).reshape(out[part].shape)
        return out

    def same(self, one: str, other: str) -> bool:
        """Return whether two tensors hold the same values."""
        return torch.equal(self.read(one), self.read(other))
