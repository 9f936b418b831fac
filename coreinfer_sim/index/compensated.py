"""Compensated sets on disk: one safetensors file for each keep ratio and cluster, and one for the whole corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import write_atomic


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
    """Compensation by layer, mapped from its file when it is used: a set on disk takes no memory."""

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        """Stand for the layers ``numbers`` of a file that has been checked."""
        self._path, self._numbers = path, tuple(numbers)

    def __getitem__(self, number: int) -> LayerCompensation:
        """Return one layer's; its values are read from the disk when they are used."""
        if number not in self._numbers:
            raise KeyError(number)
        try:
            return _compensation(self._path, load_file(self._path), number)
        except (SafetensorError, OSError, KeyError) as error:
            raise _unreadable(self._path, error) from error

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
        return StoredCompensation(self._path, [number for number in self._numbers if number in numbers])


def _compensation(path: Path, tensors: Mapping[str, torch.Tensor], number: int) -> LayerCompensation:
    right = tensors.get(f"{number}.right")
    if f"{number}.bypass_in" in tensors or (right is not None and len(right)):
        form = "with a bypass" if f"{number}.bypass_in" in tensors else "in two factors"
        raise IndexFormatError(
            f"{path} holds compensation that was stored {form}, which this release does not read; build the index anew."
        )
    if right is not None:  # a factor of no rows: nothing changes
        return LayerCompensation(tensors[f"{number}.bias"])
    return LayerCompensation(tensors[f"{number}.bias"], tensors.get(f"{number}.left"))


def _unreadable(path: Path, error: Exception) -> IndexFormatError:
    return IndexFormatError(f"{path} cannot be read ({error}); copy it again or build the index anew.")


def load_compensated(path: Path, d_model: int, n_layers: int) -> tuple[dict[int, torch.Tensor], StoredCompensation]:
    """Read the ids and find the compensation by layer; see `NeuronSelection.check` for what is checked of the ids.

    Raises:
        IndexFormatError: the file cannot be read, or its shapes do not fit together.
    """
    try:
        tensors = load_file(path)
        ids = {n: tensors[f"{n}.ids"].long() for n in range(n_layers) if f"{n}.ids" in tensors}
        found = {number: _compensation(path, tensors, number) for number in ids}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    for number, repair in found.items():
        if not _fits(repair, d_model, len(ids[number])):
            raise IndexFormatError(
                f"{path}: the compensation of layer {number} has shapes that do not fit {len(ids[number])} neurons and "
                f"d_model {d_model}; copy it again or build the index anew."
            )
    return ids, StoredCompensation(path, list(ids))


def _fits(repair: LayerCompensation, d_model: int, n_kept: int) -> bool:
    delta = repair.delta
    return repair.bias.shape == (d_model,) and (delta is None or delta.shape == (d_model, n_kept))
