"""Compensated sets on disk: one safetensors file for each keep ratio and cluster, and one for the whole corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.index.manifest import FileInfo
from coreinfer_sim.index.verified import StoredTensor, VerifiedFile

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class LayerCompensation:
    """What is added to the compact MLP of one layer, so that its kept neurons make up for the dropped ones."""

    bias: torch.Tensor
    """Added to the output bias, [d_model]."""
    delta: torch.Tensor | None = None
    """Change of the kept neurons' output weights, [d_model, n_kept]; None: they stay as they are."""

    def to(self, device: str | torch.device, copy: bool = False) -> LayerCompensation:
        """Return it on another device; with ``copy`` even if it is there: what comes from a file holds on to all of that."""
        delta = None if self.delta is None else self.delta.to(device, copy=copy)
        return LayerCompensation(self.bias.to(device, copy=copy), delta)


@dataclass(frozen=True, eq=False)
class Refit:
    """What makes up for the neurons that tokens leave out, where each token chooses among all of them."""

    read_ratio: float
    """Share of d_ff that a token reads, for which alone it is meant."""
    layout: str
    """Of the weights that it was fitted to, as the engine names it."""
    changes: Mapping[int, LayerCompensation]
    """Of all layers' output weights and biases, over all neurons."""


def save_compensated(
    path: Path, ids: Mapping[int, torch.Tensor], compensation: Mapping[int, LayerCompensation]
) -> None:
    """Write a set in one step: ids as int32, everything else as bfloat16.

    Args:
        path: the file to write.
        ids: kept neurons by layer, ascending, [n_kept].
        compensation: of each of these layers.
    """
    tensors = {}
    for number, kept in ids.items():
        repair = compensation[number]
        tensors[f"{number}.ids"] = kept.to(torch.int32)
        tensors[f"{number}.bias"] = repair.bias.to(torch.bfloat16).contiguous()
        if repair.delta is not None:
            tensors[f"{number}.left"] = repair.delta.to(torch.bfloat16).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda part: part.write_bytes(save(tensors)))


class StoredCompensation(Mapping[int, LayerCompensation]):
    """Compensation by layer, read from its file when it is used: a set on disk takes no memory."""

    def __init__(self, file: VerifiedFile, tensors: Mapping[str, StoredTensor], numbers: Sequence[int]) -> None:
        """Stand for the layers ``numbers`` of a file that has been checked."""
        self._file, self._tensors, self._numbers = file, tensors, tuple(numbers)

    def __getitem__(self, number: int) -> LayerCompensation:
        """Read one layer's.

        Raises:
            IndexFormatError: the file is not what it was.
        """
        if number not in self._numbers:
            raise KeyError(number)
        bias, delta = _parts(self._tensors, number)
        return LayerCompensation(_read(self._file, bias), None if delta is None else _read(self._file, delta))

    def __contains__(self, number: object) -> bool:
        """Return whether a layer is among them, without reading the file."""
        return number in self._numbers

    def __iter__(self) -> Iterator[int]:
        """Draw the layers' numbers."""
        return iter(self._numbers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._numbers)

    def only(self, numbers: Mapping[int, int]) -> StoredCompensation:
        """Return that of fewer layers."""
        return StoredCompensation(self._file, self._tensors, [each for each in self._numbers if each in numbers])


def _parts(tensors: Mapping[str, StoredTensor], number: int) -> tuple[StoredTensor, StoredTensor | None]:
    """Return where bias and delta of a layer are; of earlier releases' sets a factor of no rows changes nothing."""
    delta = None if f"{number}.right" in tensors else tensors.get(f"{number}.left")
    return tensors[f"{number}.bias"], delta


def _read(file: VerifiedFile, tensor: StoredTensor) -> torch.Tensor:
    """Read a tensor into memory of its own."""
    if tensor.begin == tensor.end:
        return torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype])
    return torch.frombuffer(file.read(tensor.begin, tensor.end), dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)


def load_compensated(
    path: Path, d_model: int, n_layers: int, expected: FileInfo | None = None
) -> tuple[dict[int, torch.Tensor], StoredCompensation]:
    """Read the ids and find the compensation by layer; see `NeuronSelection.check` for what is checked of the ids.

    Args:
        path: of the set.
        d_model: of the model.
        n_layers: of the model.
        expected: of the index's manifest; None compares the file with nothing.

    Raises:
        IndexFormatError: the file cannot be read, is another one, or its shapes do not fit together.
    """
    file = VerifiedFile(path, expected)
    tensors = file.tensors()
    ids = {}
    for number in (each for each in range(n_layers) if f"{each}.ids" in tensors):
        _check_form(file.path, tensors, number)
        kept = ids[number] = _read(file, tensors[f"{number}.ids"]).long()
        bias, delta = _parts(tensors, number)
        if bias.shape != (d_model,) or (delta is not None and delta.shape != (d_model, len(kept))):
            raise IndexFormatError(
                f"{path}: the compensation of layer {number} has shapes that do not fit {len(kept)} neurons and "
                f"d_model {d_model}; copy it again or build the index anew."
            )
    return ids, StoredCompensation(file, tensors, list(ids))


def _check_form(path: Path, tensors: Mapping[str, StoredTensor], number: int) -> None:
    """Raise IndexFormatError for compensation that is missing, or was stored in a form of earlier releases."""
    right = tensors.get(f"{number}.right")
    if f"{number}.bypass_in" in tensors or (right is not None and right.shape[0]):
        form = "with a bypass" if f"{number}.bypass_in" in tensors else "in two factors"
        raise IndexFormatError(
            f"{path} holds compensation that was stored {form}, which this release does not read; build the index anew."
        )
    parts = [tensors[name] for name in (f"{number}.{part}" for part in ("ids", "bias", "left")) if name in tensors]
    if f"{number}.bias" not in tensors or any(part.dtype not in _DTYPES for part in parts):
        raise IndexFormatError(f"{path} lacks the bias of layer {number}; copy it again or build the index anew.")
