"""Laid-out weights in a model: from a layout in the user's cache, whose records of neurons may stay on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreinfer_sim.base.errors import StoreError
from coreinfer_sim.engines.lean.blocks import HEAD
from coreinfer_sim.engines.lean.disk_records import DiskRecords
from coreinfer_sim.engines.lean.head import CoarseHead
from coreinfer_sim.engines.lean.matrix import Linear, Matrix, by_projection
from coreinfer_sim.engines.lean.planes import TokenMLP
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP
from coreinfer_sim.engines.linear import MappedProduct, hand_over, hand_over_table
from coreinfer_sim.models.layout_file import Layout, mapped_tensors, read_layout, weights_file
from coreinfer_sim.models.loading import LanguageModel, compact_head_inputs
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.weightless import empty_like

MATRICES, TENSORS = ("gate", "up"), ("records", "norms", "up_bias", "bias")
"""What an MLP that lies by neuron consists of."""


@dataclass
class Parts:
    """A model's weights: matrices by the names of their modules, other parameters by their own."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    mlps: dict[int, TokenMLP | ReluMLP] = field(default_factory=dict)
    """MLPs that lie by neuron, in place of their matrices."""
    head: CoarseHead | None = None
    disk: DiskRecords | None = None
    """Where records lie that are not in memory."""
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    sketch: list[list[float]] = field(default_factory=list)
    """Of each layer, as `weight_sketch` takes it before anything is rounded."""


def from_layout(name: str, place: Path, held: int | None) -> LanguageModel:
    """Return a model from its layout; ``held`` as in `load_laid_out`.

    Raises:
        StoreError: the layout is damaged.
        ConfigError: the system has no way to read records from the disk.
    """
    layout = read_layout(place)
    facts = layout.facts
    with _readable(place):
        settings = place if (place / "config.json").is_file() else Path(name)
        dtype, tied, notes = getattr(torch, facts["dtype"]), facts["tied"], facts["notes"]
    model, tokenizer, mended = empty_like(name, settings, dtype, tied)
    with _readable(place):
        parts = _mapped(model, place, layout, held)
    return whole(name, model, tokenizer, [*notes, *mended], parts)


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Say of a layout that is not as it should be that it is damaged."""
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"The weights in {place} are of another kind ({error!r})") from error


def _mapped(model: Any, place: Path, layout: Layout, held: int | None) -> Parts:
    """Return a model's weights, mapped from its layout."""
    facts, apart = layout.facts, _apart(model, layout) if held is not None else set()
    tensors = mapped_tensors(place, layout, apart.__contains__)
    parts = Parts(others=tensors, sketch=facts["sketch"])
    tables = [tensors[name] for name in sorted(apart) if not name.endswith(":records")]
    for module, (kind, n_out, n_in) in facts["matrices"].items():
        weight, scales, bias = (tensors.pop(f"{module}:{part}", None) for part in ("codes", "scales", "bias"))
        assert weight is not None
        parts.matrices[module] = Matrix(kind, n_out, n_in, weight, scales, bias)
    if "head:copy" in parts.matrices:
        parts.head = CoarseHead(parts.matrices.pop("head:copy"), tensors.pop("head:bounds"))
    for number, (kind, of_outputs) in facts.get("mlps", {}).items():  # not named by earlier versions
        gate, up = (parts.matrices.pop(f"{number}:{what}", None) for what in MATRICES)
        records, norms, up_bias, bias = (tensors.pop(f"{number}:{what}", None) for what in TENSORS)
        assert gate is not None and records is not None
        if up is None:
            parts.mlps[int(number)] = ReluMLP(gate, kind, of_outputs, records, up_bias, bias)
        else:
            assert norms is not None
            parts.mlps[int(number)] = TokenMLP(gate, up, kind, of_outputs, records, norms, bias)
    if held is not None:
        mlps = {number: mlp for number, mlp in sorted(parts.mlps.items()) if isinstance(mlp, TokenMLP)}
        begins = [layout.places[f"{number}:records"][2] for number in mlps]
        parts.disk = DiskRecords(weights_file(place), [mlp.records for mlp in mlps.values()], begins, tables, held)
        for (number, mlp), own in zip(mlps.items(), parts.disk.layers, strict=True):
            parts.mlps[number] = replace(mlp, on_disk=own)
    return parts


def _apart(model: Any, layout: Layout) -> set[str]:
    """Return the names of tensors that stay on the disk: records, embeddings, and an output head that has a copy."""
    found = {name for name in layout.places if name.endswith(":records")}
    table = model.get_input_embeddings()
    found |= {f"{name}.weight" for name, module in model.named_modules() if module is table} & set(layout.places)
    return found | ({f"{HEAD}:codes"} if "head:copy" in layout.facts["matrices"] else set())


def whole(name: str, model: Any, tokenizer: Any, notes: list[str], parts: Parts) -> LanguageModel:
    """Put its weights into a model that has none."""
    for place, value in parts.others.items():
        owner, _, leaf = place.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for place, matrix in parts.matrices.items():
        module = model.get_submodule(place)
        if isinstance(module, nn.Embedding):
            hand_over_table(module, matrix)
        else:
            _hand_over(module, matrix, model.dtype)
    if model.config.tie_word_embeddings:
        table, head = model.get_input_embeddings(), parts.matrices[HEAD]
        if head.weight.dtype is model.dtype:
            table.weight = model.lm_head.weight
        else:
            hand_over_table(table, head)
    compact_head_inputs(model)
    layers = find_mlps(model)
    for number, mlp in parts.mlps.items():
        layer = layers[number]
        for projection, part in by_projection(layer.projections, mlp.parts, layer.fused).items():
            _hand_over(layer.projection(projection), part, model.dtype)
    model.laid_out, model.laid_out_mlps, model.laid_out_head = parts.matrices, parts.mlps, parts.head
    if parts.disk is not None:
        model.laid_out_disk = parts.disk
        if parts.head is not None and parts.matrices[HEAD].weight.dtype is model.dtype:
            model.lm_head.forward = MappedProduct(model.lm_head)
    for layer, values in zip(layers, parts.sketch, strict=True):
        layer.output.sketch = torch.tensor(values)
    return LanguageModel(model.eval(), tokenizer, name, layers, notes=notes)


def _hand_over(module: Any, part: Linear, dtype: torch.dtype) -> None:
    """Let a linear layer multiply by its weights as they are laid out, which its own code does if they lie as it knows them."""
    if isinstance(part, Matrix) and part.weight.dtype is dtype:
        module.weight = nn.Parameter(part.weight, requires_grad=False)
    else:
        hand_over(module, part)
