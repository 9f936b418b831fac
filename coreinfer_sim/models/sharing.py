"""One copy of a model's weights for all processes of a machine: they lie in a file that each maps into its memory.

Weights that were widened or dequantised when they were loaded would otherwise lie in each process apart.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.files import remove
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.models.layout_file import Layout, LayoutWriter, mapped_tensors, read_layout, writing
from coreinfer_sim.models.loading import LanguageModel

_LEAST = 4096
"""Bytes from which on a tensor lies in the file."""
_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


@dataclass(frozen=True)
class SharedModel:
    """A model without its weights, and where these are; picklable."""

    place: Path
    """Of the layout that holds them."""
    rest: bytes
    """Everything else, as `pickle` writes it."""

    def load(self) -> LanguageModel:
        """Return the model, whose weights stay in the file's memory map."""
        found: LanguageModel = _Reader(io.BytesIO(self.rest), _mapped(self.place)).load()
        return found


def share(language_model: LanguageModel, place: Path) -> SharedModel | None:
    """Write the weights of a model on the CPU into a folder, from which it then reads them itself as well.

    Args:
        language_model: which maps the file afterwards; its own copy of the weights is given back.
        place: of the folder; what is there is replaced.

    Returns:
        The model for other processes; None if it holds what cannot be sent to one.
    """
    remove(place)
    rest = io.BytesIO()
    try:
        with writing(place, Layout(language_model.name, language_model.dtype_name)) as writer:
            pickler = _Writer(rest, writer)
            pickler.dump(language_model)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    mapped = _mapped(place)
    for name, tensor in pickler.tensors.items():
        tensor.data = mapped[name]
    give_back_memory()
    return SharedModel(place, rest.getvalue())


def _mapped(place: Path) -> dict[str, torch.Tensor]:
    return mapped_tensors(place, read_layout(place))


class _Writer(pickle.Pickler):
    """Puts large tensors and arrays into a layout, and their names into the pickle."""

    def __init__(self, file: io.BytesIO, writer: LayoutWriter) -> None:
        super().__init__(file)
        self._writer = writer
        self.tensors: dict[str, torch.Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, np.ndarray) and obj.nbytes >= _LEAST and obj.dtype.kind in "iufb":
            return ("array", self._name(obj), obj.dtype.str, obj.shape)
        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.nbytes < _LEAST or obj.dtype not in _KINDS:
            return None
        if obj.device.type != "cpu" or obj.layout is not torch.strided or not obj.is_contiguous():
            return None
        return ("tensor", self._name(obj), isinstance(obj, torch.nn.Parameter), obj.requires_grad)

    def _name(self, obj: Any) -> str:
        """Return what an object is called in the layout; what was seen before, such as a tied matrix, is written once."""
        name = self._names.get(id(obj))
        if name is None:
            name = self._names[id(obj)] = str(len(self._names))
            if isinstance(obj, np.ndarray):
                self._arrays[name] = obj  # which keeps its id from being another's
                self._writer.add(name, torch.frombuffer(bytearray(np.ascontiguousarray(obj)), dtype=torch.uint8))
            else:
                self.tensors[name] = obj
                self._writer.add(name, obj)
        return name


class _Reader(pickle.Unpickler):
    """Puts mapped tensors where `_Writer` took tensors out."""

    def __init__(self, file: io.BytesIO, mapped: dict[str, torch.Tensor]) -> None:
        super().__init__(file)
        self._mapped = mapped
        self._found: dict[str, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, name, *more = pid
        if name not in self._found:
            tensor = self._mapped[name]
            if kind == "array":
                self._found[name] = tensor.numpy().view(np.dtype(more[0])).reshape(more[1])
            else:
                self._found[name] = torch.nn.Parameter(tensor, requires_grad=more[1]) if more[0] else tensor
        return self._found[name]
