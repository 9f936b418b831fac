"""Tensors of a GGUF file under the names of the model's own parameters, one of which is read at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch

from coreinfer_sim.models.gguf_codes import QuantisedTensor, own_codes, stored_dtype, unread_codes
from coreinfer_sim.models.gguf_names import GGUFNames

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
    added: float = 0.0
    """What the file's values are greater by."""

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
        reader = gguf.GGUFReader(path)
        names = GGUFNames(reader, config)
        for tensor in reader.tensors:
            of_file = str(tensor.name)
            name = names.find(of_file)
            self.names.add(name or of_file)
            if name is not None:
                shape = tuple(int(n) for n in reversed(tensor.shape))
                order, added = names.order(of_file, shape[0]), names.added(of_file)
                self.tensors[name] = GGUFTensor(shape, tensor.tensor_type, tensor.data, order, added)
        self.codes: dict[str, QuantisedTensor] = own_codes(reader, names, config.tie_word_embeddings)
        """Matrices whose codes can be taken as they are, by the modules' names."""
        self.widened: list[str] = unread_codes(reader)
        """The types of others that are quantised."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a whole tensor, dequantised."""
        tensor = self.tensors[name]
        out = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        for begin in range(0, len(out), _ROWS):
            part = slice(begin, begin + _ROWS)
            rows = tensor.raw[part] if tensor.order is None else tensor.raw[tensor.order[part]]
            values: np.ndarray[Any, Any] = gguf.quants.dequantize(rows, tensor.kind)
            out[part] = torch.from_numpy(values.astype(np.float32) - np.float32(tensor.added)).reshape(out[part].shape)
        return out

    def same(self, one: str, other: str) -> bool:
        """Return whether two tensors hold the same values."""
        return torch.equal(self.read(one), self.read(other))
