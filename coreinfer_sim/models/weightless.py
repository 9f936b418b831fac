"""A model without weights whose tensors are read one at a time: from safetensors files, or a GGUF file."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coreinfer_sim.models.checkpoint import Checkpoint, has_safetensors
from coreinfer_sim.models.gguf_checkpoint import GGUFCheckpoint
from coreinfer_sim.models.gguf_codes import QuantisedTensor
from coreinfer_sim.models.gguf_reading import read_once
from coreinfer_sim.models.mlps import MLPLayer, find_mlps
from coreinfer_sim.models.parameters import ParameterNames, Tensors, empty_model, main_dtype, untie
from coreinfer_sim.models.source import ADAPTER_FILE, holds_fp8, load_errors, read_config, source_of
from coreinfer_sim.models.whole import check_whole


@dataclass(frozen=True)
class Weightless:
    """A model whose parameters are not there yet."""

    name: str
    """What the user called it."""
    model: Any
    tokenizer: Any
    layers: list[MLPLayer]
    notes: list[str]
    """On what was passed over in the checkpoint."""
    mended: list[str]
    """On what was mended in configuration and tokenizer."""
    names: ParameterNames
    tensors: Tensors
    of_gguf: bool

    def read(self, parameter: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the value of a parameter, such as ``lm_head.weight``."""
        place = self.names.find(self.names.tied.get(parameter, parameter))
        assert place is not None  # as the model is whole
        return self.tensors.read(place, dtype)

    def bias(self, module: str) -> torch.Tensor | None:
        """Return the bias of a linear module in the model's type, or None if it has none."""
        has_one = self.model.get_submodule(module).bias is not None
        return self.read(f"{module}.bias", self.model.dtype) if has_one else None

    def codes(self, module: str) -> QuantisedTensor | None:
        """Return the codes of a module's weights as a GGUF file holds them; None: it holds other weights."""
        return self.tensors.codes.get(module) if isinstance(self.tensors, GGUFCheckpoint) else None

    def save_settings(self, folder: Path) -> None:
        """Save configuration and tokenizer, mended."""
        for part in (self.model.config, self.model.generation_config, self.tokenizer):
            part.save_pretrained(folder)


def is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file that is there."""
    return Path(name).suffix.lower() == ".gguf" and Path(name).is_file()


def files_of(name: str) -> list[Path]:
    """Return all files of a local model that decide what its weights are; none: it is not one that is read here.

    Raises:
        ModelError: it is plainly no whole model.
    """
    folder = Path(name)
    if is_gguf(name):
        return [folder]
    whole = (folder / "config.json").is_file() and has_safetensors(folder)
    if not whole or (folder / ADAPTER_FILE).is_file():
        return []
    source_of(name)
    return [*Checkpoint(folder).files, folder / "config.json"]


def stored_dtype(name: str) -> torch.dtype:
    """Return the type of most weights of a checkpoint folder."""
    return main_dtype(Checkpoint(Path(name)))


def stored_config(name: str) -> Any:
    """Return the configuration of a checkpoint folder."""
    return read_config(name, name, {})


@read_once()
def open_weightless(name: str, families: Container[str]) -> Weightless | None:
    """Return a model without its weights, or None if its type is not among some.

    Args:
        name: of a local checkpoint folder in safetensors format, or a GGUF file.
        families: model types.

    Raises:
        ModelError: it is not whole.
    """
    source, options = source_of(name)
    config = read_config(name, source, options, fp8=True)
    if config.model_type not in families or holds_fp8(config):
        return None
    with load_errors(name):
        tensors = GGUFCheckpoint(options["gguf_file"], config) if options else Checkpoint(Path(name))
    dtype = main_dtype(tensors)
    model, tokenizer, mended = empty_model(
        name, config, source, options, dtype, lambda each: ParameterNames(each, tensors).tied_as_stored()
    )
    layers, names = find_mlps(model), ParameterNames(model, tensors)
    notes = check_whole(name, model, layers, names.found())
    if isinstance(tensors, GGUFCheckpoint) and tensors.widened:
        kinds, wide = ", ".join(tensors.widened), str(dtype).removeprefix("torch.")
        notes.append(f"Note: weights of {name} in {kinds} are widened to {wide}, as the loops do not read such codes.")
    return Weightless(name, model, tokenizer, layers, notes, mended, names, tensors, bool(options))


def empty_like(name: str, settings: Path, dtype: torch.dtype, tied: bool) -> tuple[Any, Any, list[str]]:
    """Return what `empty_model` does from configuration and tokenizer in a folder.

    Args:
        name: what the user called the model.
        settings: the folder.
        dtype: of the weights.
        tied: whether the weights that it ties are stored as one.
    """
    config = read_config(name, str(settings), {})
    if not tied:
        untie(config)
    return empty_model(name, config, str(settings), {}, dtype, lambda _: True)
