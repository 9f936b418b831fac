"""Loading a model as the loops read it: from the user's cache, or tensor by tensor from its checkpoint.

The model never lies in memory as transformers would load it, and no weight twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreinfer_sim.base.errors import StoreError
from coreinfer_sim.base.files import locked, remove
from coreinfer_sim.base.memory import give_back_memory, keep_heap_small
from coreinfer_sim.base.progress import Progress, readable_size
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.architectures import ARCHITECTURES, Architecture, architecture_of
from coreinfer_sim.engines.lean.blocks import HEAD, TOKEN_KINDS, rounded_kind, skips_zeros, unsupported
from coreinfer_sim.engines.lean.head import CoarseHead
from coreinfer_sim.engines.lean.matrix import Linear, Matrix, by_projection, from_codes
from coreinfer_sim.engines.lean.planes import TokenMLP, of_stored, of_weights
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP, of_relu
from coreinfer_sim.engines.linear import hand_over, hand_over_table
from coreinfer_sim.models.fingerprint import SKETCH_SIZE, sketch_places
from coreinfer_sim.models.layout_file import (
    Layout,
    LayoutWriter,
    layout_folder,
    mapped_tensors,
    read_layout,
    writing,
)
from coreinfer_sim.models.loading import LanguageModel, compact_head_inputs
from coreinfer_sim.models.mlps import MLPLayer, find_mlps
from coreinfer_sim.models.weightless import (
    Weightless,
    empty_like,
    files_of,
    is_gguf,
    open_weightless,
    stored_config,
    stored_dtype,
)

_GGUF = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose GGUF files are read here; transformers reads the others, and widens them."""
_MATRICES, _TENSORS = ("gate", "up"), ("records", "norms", "up_bias", "bias")
"""What an MLP that lies by neuron consists of."""


@dataclass(frozen=True)
class Wanted:
    """How a model is to be laid out."""

    weights: Weights
    by_token: bool
    zeros: bool = False
    """By neuron, as tokens pass over those that are zero."""

    @property
    def by_neuron(self) -> str:
        """What MLPs lie by neuron for; empty: they do not."""
        return "by token" if self.by_token else "by neuron" if self.zeros else ""


@dataclass
class _Parts:
    """A model's weights: matrices by the names of their modules, other parameters by their own."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    mlps: dict[int, TokenMLP | ReluMLP] = field(default_factory=dict)
    """MLPs that lie by neuron, in place of their matrices."""
    head: CoarseHead | None = None
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    sketch: list[list[float]] = field(default_factory=list)
    """Of each layer, as `weight_sketch` takes it before anything is rounded."""


def load_laid_out(
    name: str, weights: Weights, by_token: bool = False, progress: Progress | None = None
) -> LanguageModel | None:
    """Load a model whose weights are packed, or None if it is not one, or its weights can stay where they lie.

    Args:
        name: as `load_model` takes it.
        weights: their type.
        by_token: lay the MLPs out by neuron.
        progress: receives what is done.

    Raises:
        ModelError: as `load_model`.
    """
    progress = progress or Progress()
    files = files_of(name)
    zeros = bool(files) and not by_token and not is_gguf(name) and skips_zeros(stored_config(name), weights)
    wanted = Wanted(weights, by_token, zeros)
    as_stored = weights is Weights.STORED and not is_gguf(name)
    as_stored |= weights is Weights.BF16 and bool(files) and not is_gguf(name) and stored_dtype(name) is torch.bfloat16
    if not files or (as_stored and not wanted.by_neuron):
        return None
    of_neurons = wanted.by_neuron and f"-{wanted.by_neuron.replace(' ', '-')}"
    kind = f"{'stored' if as_stored else weights.value}{of_neurons}"
    place = layout_folder(files, kind, progress)
    keep_heap_small()  # before anything large is allocated: prefill's activations would else stay in the heap as holes
    return _kept(name, place, progress) or _made(name, place, wanted, progress)


def _kept(name: str, place: Path, progress: Progress) -> LanguageModel | None:
    """Return a model that was laid out before; what is damaged is taken away."""
    if not place.is_dir():
        return None
    try:
        return _from_layout(name, place)
    except StoreError as error:
        progress.say(f"{error}; they are laid out anew from {name}.")
        remove(place)
        return None


def _from_layout(name: str, place: Path) -> LanguageModel:
    layout = read_layout(place)
    facts = layout.facts
    try:
        tensors = mapped_tensors(place, layout)
        parts = _Parts(others=tensors, sketch=facts["sketch"])
        for module, (kind, n_out, n_in) in facts["matrices"].items():
            weight, scales, bias = (tensors.pop(f"{module}:{part}", None) for part in ("codes", "scales", "bias"))
            assert weight is not None
            parts.matrices[module] = Matrix(kind, n_out, n_in, weight, scales, bias)
        if "head:copy" in parts.matrices:
            parts.head = CoarseHead(parts.matrices.pop("head:copy"), tensors.pop("head:bounds"))
        for number, (kind, of_outputs) in facts.get("mlps", {}).items():  # not named by earlier versions
            gate, up = parts.matrices.pop(f"{number}:gate"), parts.matrices.pop(f"{number}:up", None)
            records, norms, up_bias, bias = (tensors.pop(f"{number}:{what}", None) for what in _TENSORS)
            assert records is not None
            if up is None:
                parts.mlps[int(number)] = ReluMLP(gate, kind, of_outputs, records, up_bias, bias)
            else:
                assert norms is not None
                parts.mlps[int(number)] = TokenMLP(gate, up, kind, of_outputs, records, norms, bias)
        settings = place if (place / "config.json").is_file() else Path(name)
        dtype, tied, notes = getattr(torch, facts["dtype"]), facts["tied"], facts["notes"]
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"The weights in {place} are of another kind ({error!r})") from error
    model, tokenizer, mended = empty_like(name, settings, dtype, tied)
    return _whole(name, model, tokenizer, [*notes, *mended], parts)


def _made(name: str, place: Path, wanted: Wanted, progress: Progress) -> LanguageModel | None:
    # 1) the model without weights
    empty = open_weightless(name, _GGUF if is_gguf(name) else ARCHITECTURES)
    if empty is None or unsupported(empty.model) is not None:
        return None
    found = architecture_of(empty.model.config)
    if isinstance(found, str) or not found.packs or (wanted.by_token and not empty.layers[0].gated):
        return None
    # 2) its weights, on the disk or, where they find no room, in memory
    try:
        lock = locked(place.parent, progress)
        try:
            made = _kept(name, place, progress)  # another process may have made it meanwhile
            if made is None:
                layout = Layout(name, f"{wanted.weights.value} {wanted.by_neuron}".rstrip())
                with writing(place, layout) as writer:
                    _write(empty, wanted, writer, progress)
                progress.say(f"The weights were laid out in {place}, once: {readable_size(layout.n_bytes)}.")
                made = _from_layout(name, place)
        finally:
            lock.release()
    except OSError as error:
        progress.say(
            f"The weights are laid out in memory, as {place.parent} cannot be written ({error}); make room there, or name "
            "another folder in COREINFER_SIM_CACHE, and the next start will be fast."
        )
        made = _in_memory(empty, wanted, progress)
    give_back_memory()
    return made


def _write(empty: Weightless, wanted: Wanted, writer: LayoutWriter, progress: Progress) -> None:
    """Write all parts of a model, and what takes long to read from a GGUF file: configuration and tokenizer."""
    matrices: dict[str, tuple[str, int, int]] = {}
    mlps: dict[str, tuple[str, str]] = {}
    sketch: list[list[float]] = []

    def write(name: str, part: Matrix) -> None:
        matrices[name] = part.kind, part.n_out, part.n_in
        for what, tensor in (("codes", part.weight), ("scales", part.scales), ("bias", part.bias)):
            if tensor is not None:
                writer.add(f"{name}:{what}", tensor)

    for name, part in _parts(empty, wanted, sketch, progress):
        if isinstance(part, Matrix):
            write(name, part)
        elif isinstance(part, TokenMLP | ReluMLP):
            mlps[name] = part.kind, part.output_kind
            for what in _MATRICES:  # they become matrices of the MLP again
                if hasattr(part, what):
                    write(f"{name}:{what}", getattr(part, what))
            for what in _TENSORS:
                tensor = getattr(part, what, None)
                if tensor is not None:
                    writer.add(f"{name}:{what}", tensor)
        elif isinstance(part, CoarseHead):
            write("head:copy", part.copy)
            writer.add("head:bounds", part.bounds)
        else:
            writer.add(name, part)
    notes = empty.notes
    if empty.of_gguf:
        empty.save_settings(writer.folder)
        notes = [*notes, *empty.mended]
    writer.layout.facts |= {
        "matrices": matrices,
        "mlps": mlps,
        "dtype": str(empty.model.dtype).removeprefix("torch."),
        "tied": bool(empty.model.config.tie_word_embeddings),
        "sketch": sketch,
        "notes": notes,
    }


def _in_memory(empty: Weightless, wanted: Wanted, progress: Progress) -> LanguageModel:
    parts = _Parts()
    for name, part in _parts(empty, wanted, parts.sketch, progress):
        if isinstance(part, Matrix):
            parts.matrices[name] = part
        elif isinstance(part, TokenMLP | ReluMLP):
            parts.mlps[int(name)] = part
        elif isinstance(part, CoarseHead):
            parts.head = part
        else:
            parts.others[name] = part
    return _whole(empty.name, empty.model, empty.tokenizer, [*empty.notes, *empty.mended], parts)


def _parts(
    empty: Weightless, wanted: Wanted, sketch: list[list[float]], progress: Progress
) -> Iterator[tuple[str, Matrix | TokenMLP | ReluMLP | CoarseHead | torch.Tensor]]:
    """Read a model's weights in the order in which decode reads them, one at a time, and sample them for the sketch.

    MLPs that lie by neuron are named by the numbers of their layers.
    """
    model, layers, weights = empty.model, empty.layers, wanted.weights
    table, found = empty.names.modules[id(model.get_input_embeddings())], architecture_of(model.config)
    plain_logits = isinstance(found, Architecture) and found.logits == 1 and not found.logits_cap
    owners = {f"{empty.names.modules[id(layer.owner)]}.{name}": layer for layer in layers for name in layer.projections}
    places = sketch_places(layers[0].d_model, layers[0].d_ff, len(layers))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # 1) matrices
    progress.start("Laying out weights", len(linears), "matrices")
    for name in linears:
        layer, own = owners.get(name), empty.codes(name)
        sampled = places[layer.number] if layer is not None and name.endswith(layer.output_name) else None
        if layer is not None and wanted.by_neuron:
            if sampled is not None:  # the last of them
                mlp, down = _by_neuron(empty, layer, wanted)
                sketch.append(down[sampled].float().tolist())
                yield str(layer.number), mlp
            progress.advance(1)
            continue
        bias = empty.bias(name)
        if weights is Weights.STORED and own is not None:
            matrix = from_codes(own, bias)
            if sampled is not None:
                values = matrix.outputs(sampled[0]).widened()[sampled[1], torch.arange(SKETCH_SIZE)]
                sketch.append(values.tolist())
            yield name, matrix
        else:
            kind = rounded_kind(name, weights)
            floating = torch.bfloat16 if weights is Weights.BF16 else model.dtype
            # what was rounded once is not rounded to 16 bits before it is rounded again
            weight = empty.read(f"{name}.weight", torch.float32 if kind and own is not None else floating)
            if sampled is not None:
                sketch.append(weight[sampled].float().tolist())
            matrix = Matrix.of(weight, bias, kind)
            yield name, matrix
            if name == HEAD and wanted.by_token and not matrix.packed and bias is None and plain_logits:
                yield name, CoarseHead.of(matrix)
        progress.advance(1)
    # 2) embeddings of their own
    codes = empty.codes(table)
    if not model.config.tie_word_embeddings and weights is Weights.STORED and codes is not None:
        yield table, from_codes(codes, None)
    elif not model.config.tie_word_embeddings:
        yield f"{table}.weight", empty.read(f"{table}.weight", model.dtype)
    # 3) norms and biases
    done = {f"{name}.weight" for name in (*linears, table)}
    for name, parameter in model.named_parameters():
        if name not in done:
            yield name, empty.read(name, parameter.dtype)
    progress.finish()


def _by_neuron(empty: Weightless, layer: MLPLayer, wanted: Wanted) -> tuple[TokenMLP | ReluMLP, torch.Tensor]:
    """Return a layer's MLP by neuron, and its down projection."""
    weights = wanted.weights
    names = [f"{empty.names.modules[id(layer.owner)]}.{name}" for name in layer.projections]
    biases, codes = [empty.bias(name) for name in names], [empty.codes(name) for name in names]
    if layer.fused:
        names[:1], codes[:1] = names[:1] * 2, codes[:1] * 2
        biases[:1] = [None, None] if biases[0] is None else list(biases[0].split(layer.d_ff))
    floating = torch.bfloat16 if weights is Weights.BF16 else empty.model.dtype

    def read(part: int, dtype: torch.dtype | None) -> torch.Tensor:
        found = empty.read(f"{names[part]}.weight", dtype or floating)
        return found.split(layer.d_ff)[part] if layer.fused and part < 2 else found

    if wanted.zeros:
        every = [read(part, None) for part in range(len(names))]
        return of_relu(every, biases, rounded_kind("", weights)), every[-1]
    of_three = biases[0], biases[1], biases[2]
    if weights is Weights.STORED:
        down = read(2, torch.float32 if codes[2] is not None else None)
        return of_stored(codes, lambda part, dtype: down if part == 2 else read(part, dtype), of_three), down
    kind = TOKEN_KINDS.get(weights)
    # what was rounded once is not rounded to 16 bits before it is rounded again
    gate, up, down = (read(part, torch.float32 if kind and codes[part] is not None else None) for part in range(3))
    return of_weights((gate, up, down), of_three, kind), down


def _whole(name: str, model: Any, tokenizer: Any, notes: list[str], parts: _Parts) -> LanguageModel:
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
    for layer, values in zip(layers, parts.sketch, strict=True):
        layer.output.sketch = torch.tensor(values)
    return LanguageModel(model.eval(), tokenizer, name, layers, notes=notes)


def _hand_over(module: Any, part: Linear, dtype: torch.dtype) -> None:
    """Let a linear layer multiply by its weights as they are laid out, which its own code does if they lie as it knows them."""
    if isinstance(part, Matrix) and part.weight.dtype is dtype:
        module.weight = nn.Parameter(part.weight, requires_grad=False)
    else:
        hand_over(module, part)
