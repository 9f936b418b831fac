"""Compensated sets on disk: one safetensors file for each keep ratio and cluster, and one for the whole corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.fitting.least_squares import LayerCompensation

_OPTIONAL = ("right", "bypass_in", "bypass_out")
_PARTS = ("bias", "left", *_OPTIONAL)


def save_compensated(path: Path, selection: NeuronSelection) -> None:
    """Write a selection with its compensation in one step: ids as int32, everything else as bfloat16."""
    assert selection.compensation is not None
    tensors = {}
    for number, ids in selection.ids.items():
        tensors[f"{number}.ids"] = ids.to(torch.int32)
        for name in _PARTS:
            value = getattr(selection.compensation[number], name)
            if value is not None:
                tensors[f"{number}.{name}"] = value.to(torch.bfloat16).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda part: part.write_bytes(save(tensors)))


class StoredCompensation(Mapping[int, LayerCompensation]):
    """Compensation by layer, mapped from its file when it is asked for: a set on disk takes no memory."""

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        """Stand for the layers ``numbers`` of a file that has been checked."""
        self._path, self._numbers = path, tuple(numbers)

    def __getitem__(self, number: int) -> LayerCompensation:
        """Return one layer's; its values are read from the disk when they are used."""
        if number not in self._numbers:
            raise KeyError(number)
        try:
            return _compensation(load_file(self._path), number)
        except (SafetensorError, OSError, KeyError) as error:
            raise _unreadable(self._path, error) from error

    def __iter__(self) -> Iterator[int]:
        """Draw the layers' numbers."""
        return iter(self._numbers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._numbers)

    def only(self, numbers: Mapping[int, int]) -> StoredCompensation:
        """Return that of fewer layers."""
        return StoredCompensation(self._path, [number for number in self._numbers if number in numbers])


def _compensation(tensors: Mapping[str, torch.Tensor], number: int) -> LayerCompensation:
    optional = (tensors.get(f"{number}.{name}") for name in _OPTIONAL)
    return LayerCompensation(tensors[f"{number}.bias"], tensors[f"{number}.left"], *optional)


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
        found = {number: _compensation(tensors, number) for number in ids}
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
    shapes = {name: None if (part := getattr(repair, name)) is None else tuple(part.shape) for name in _PARTS}
    rank = None if repair.right is None else len(repair.right)
    return (
        shapes["bias"] == (d_model,)
        and shapes["left"] == (d_model, n_kept if rank is None else rank)
        and shapes["right"] in (None, (rank, n_kept))
        and shapes["bypass_in"] in (None, (repair.bypass_rank, d_model))
        and shapes["bypass_out"] == (None if repair.bypass_in is None else (d_model, repair.bypass_rank))
    )
