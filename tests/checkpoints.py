"""Checkpoints and GGUF files that are changed as damage, mistakes and other programs change them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.laid_out import load_laid_out
from coreinfer_sim.models.budgeted import load_within
from coreinfer_sim.models.loading import LanguageModel, load_model

Tensors = dict[str, torch.Tensor]
WAYS = {
    "whole": load_model,
    "within a budget": lambda name: load_within(name, lambda _model, _shape: 64),
    "laid out": lambda name: load_laid_out(name, Weights.INT8) or load_model(name),
}
"""The ways to load a checkpoint folder; all refuse the same."""


def saved_family(folder: Path, key: str) -> Path:
    """Save the tiny model of a family with a tokenizer."""
    tiny_model(key).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved(folder: Path, **config: Any) -> Path:
    """Save the tiny Llama."""
    return Path(save_tiny_checkpoint(folder, **config))


def with_tensors(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change the tensors of a checkpoint that is one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return folder


def with_json(folder: Path, name: str = "config.json", **values: Any) -> Path:
    """Change fields of a JSON file of a checkpoint, which may not be there yet."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))
    return folder


def loads(name: Path | str) -> list[LanguageModel]:
    """Load in the two ways that round nothing."""
    return [WAYS[way](str(name)) for way in ("whole", "within a budget")]


def refused_by_all(name: Path | str, error: type[Exception], *says: str) -> None:
    """Check that all ways refuse a checkpoint, in one sentence that says certain things."""
    for load in WAYS.values():
        with pytest.raises(error) as raised:
            load(str(name))
        message = str(raised.value)
        assert message.endswith(".") and "\n" not in message
        for text in says:
            assert text in message, message


def rewritten(
    source: Path,
    out: Path,
    *,
    without: Sequence[str] = (),
    more: Sequence[tuple[str, Any]] = (),
    fields: Sequence[tuple[str, Any, gguf.GGUFValueType]] = (),
) -> Path:
    """Write a GGUF file again, without some tensors, and with more tensors and fields."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(out), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=of)
    for name, value, kind in fields:
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if not any(part in tensor.name for part in without):
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, value in more:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
