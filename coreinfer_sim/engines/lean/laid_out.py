"""Loading a model as the loops read it: from the user's cache, or tensor by tensor from its checkpoint.

The model never lies in memory as transformers would load it, and no weight twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from coreinfer_sim.base.errors import StoreError
from coreinfer_sim.base.files import locked, remove
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.progress import Progress, readable_size
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.architectures import ARCHITECTURES, architecture_of
from coreinfer_sim.engines.lean.blocks import HEAD, TOKEN_KINDS, rounded_kind, skips_zeros, unsupported
from coreinfer_sim.engines.lean.disk_parts import disk_parts
from coreinfer_sim.engines.lean.head import CoarseHead
from coreinfer_sim.engines.lean.matrix import Matrix, from_codes, halves
from coreinfer_sim.engines.lean.mlp_loops import by_token_loop, from_disk_loop
from coreinfer_sim.engines.lean.opened_layout import MATRICES, TENSORS, Parts, from_layout, whole
from coreinfer_sim.engines.lean.planes import TokenMLP, of_stored, of_weights
from coreinfer_sim.engines.lean.relu_mlp import ReluMLP, of_relu
from coreinfer_sim.engines.sizes import Planner
from coreinfer_sim.models.fingerprint import SKETCH_SIZE, sketch_places
from coreinfer_sim.models.gguf_names import TYPES as GGUF_TYPES
from coreinfer_sim.models.layout_file import (
    Layout,
    LayoutWriter,
    layout_folder,
    writing,
)
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.weightless import (
    Weightless,
    files_of,
    is_gguf,
    open_weightless,
    stored_config,
    stored_dtype,
)


@dataclass(frozen=True)
class Wanted:
    """How a model is to be laid out."""

    weights: Weights
    by_token: bool
    zeros: bool = False
    """By neuron, as tokens pass over those that are zero."""
    held: int | None = None
    """Bytes of memory for records; None: all lie in memory."""

    @property
    def by_neuron(self) -> str:
        """What MLPs lie by neuron for; empty: they do not."""
        return "by token" if self.by_token else "by neuron" if self.zeros else ""


def load_laid_out(
    name: str, weights: Weights, by_token: bool = False, progress: Progress | None = None, held: int | None = None
) -> LanguageModel | None:
    """Load a model whose weights are packed, or None if it is not one, or its weights can stay where they lie.

    Args:
        name: as `load_model` takes it.
        weights: their type.
        by_token: lay the MLPs out by neuron.
        progress: receives what is done.
        held: bytes of memory for the records of neurons, all others of which are read from the disk when they are chosen, some
            at a time; an output head of which few rows are read stays there too. None: all weights lie in memory.

    Raises:
        ModelError: as `load_model`.
        StoreError: records are to be read from the disk, but cannot be written there.
    """
    progress = progress or Progress()
    files = files_of(name)
    if not files:
        return None
    zeros = not by_token and not is_gguf(name) and skips_zeros(stored_config(name), weights)
    wanted = Wanted(weights, by_token, zeros, held)
    kind = _layout_kind(name, wanted)
    if kind == Weights.STORED.value and not is_gguf(name):
        return None
    place = layout_folder(files, kind, progress)
    if by_token and held is None:
        by_token_loop()  # what compiling takes is free again before weights come into memory
    return _kept(name, place, wanted, progress) or _made(name, place, wanted, progress)


def load_on_disk(
    name: str, weights: Weights, planner: Planner, progress: Progress | None = None
) -> LanguageModel | None:
    """Load a model of which each token reads the neurons that it chooses from the disk, but for those in memory.

    Args:
        name: of a local checkpoint folder.
        weights: their type.
        planner: see `Planner`; what it raises is passed on before anything is laid out or loaded.
        progress: receives what is done.

    Returns:
        None: its type or its MLPs are not such that tokens could choose.

    Raises:
        ConfigError: it is a GGUF file, or this system has no way to read so.
        ModelError: as `load_model`.
        StoreError: it cannot be laid out on the disk.
    """
    progress = progress or Progress()
    files, empty = files_of(name), open_weightless(name, ARCHITECTURES)
    if not files or empty is None or not _fits(empty, by_token=True):
        return None
    made = layout_folder(files, _layout_kind(name, Wanted(weights, by_token=True)), progress).is_dir()
    parts = disk_parts(empty, weights, made)
    from_disk_loop()  # what compiling takes is free again before memory is planned
    held, limit = planner(LanguageModel(empty.model, empty.tokenizer, name, empty.layers), parts)
    loaded = load_laid_out(name, weights, True, progress, held)
    return None if loaded is None else replace(loaded, position_limit=limit)


def _layout_kind(name: str, wanted: Wanted) -> str:
    """Return what a layout holds, as its folder is called."""
    as_stored = wanted.weights is Weights.BF16 and not is_gguf(name) and stored_dtype(name) is torch.bfloat16
    of_neurons = wanted.by_neuron and f"-{wanted.by_neuron.replace(' ', '-')}"
    return f"{'stored' if as_stored else wanted.weights.value}{of_neurons}"


def _fits(empty: Weightless, by_token: bool) -> bool:
    """Return whether the loops decode a model as it is laid out; by token they read gated MLPs alone."""
    found = architecture_of(empty.model.config)
    if isinstance(found, str) or not found.packs or unsupported(empty.model) is not None:
        return False
    return not by_token or empty.layers[0].gated


def _kept(name: str, place: Path, wanted: Wanted, progress: Progress) -> LanguageModel | None:
    """Return a model that was laid out before; what is damaged is taken away."""
    if not place.is_dir():
        return None
    try:
        return from_layout(name, place, wanted.held)
    except StoreError as error:
        progress.say(f"{error}; they are laid out anew from {name}.")
        remove(place)
        return None


def _made(name: str, place: Path, wanted: Wanted, progress: Progress) -> LanguageModel | None:
    # 1) the model without weights
    empty = open_weightless(name, GGUF_TYPES if is_gguf(name) else ARCHITECTURES)
    if empty is None or not _fits(empty, wanted.by_token):
        return None
    # 2) its weights, on the disk or, where they find no room, in memory
    try:
        lock = locked(place.parent, progress)
        try:
            made = _kept(name, place, wanted, progress)  # another process may have made it meanwhile
            if made is None:
                layout = Layout(name, f"{wanted.weights.value} {wanted.by_neuron}".rstrip())
                with writing(place, layout) as writer:
                    _write(empty, wanted, writer, progress)
                progress.say(f"The weights were laid out in {place}, once: {readable_size(layout.n_bytes)}.")
                made = from_layout(name, place, wanted.held)
        finally:
            lock.release()
    except OSError as error:
        if wanted.held is not None:
            raise StoreError(
                f"the weights cannot be laid out in {place.parent} ({error}), expected a folder with room for the model; name "
                "another in COREINFER_SIM_CACHE."
            ) from error
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
            for what in MATRICES:  # they become matrices of the MLP again
                if hasattr(part, what):
                    write(f"{name}:{what}", getattr(part, what))
            for what in TENSORS:
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
    parts = Parts()
    for name, part in _parts(empty, wanted, parts.sketch, progress):
        if isinstance(part, Matrix):
            parts.matrices[name] = part
        elif isinstance(part, TokenMLP | ReluMLP):
            parts.mlps[int(name)] = part
        elif isinstance(part, CoarseHead):
            parts.head = part
        else:
            parts.others[name] = part
    return whole(empty.name, empty.model, empty.tokenizer, [*empty.notes, *empty.mended], parts)


def _parts(
    empty: Weightless, wanted: Wanted, sketch: list[list[float]], progress: Progress
) -> Iterator[tuple[str, Matrix | TokenMLP | ReluMLP | CoarseHead | torch.Tensor]]:
    """Read a model's weights in the order in which decode reads them, one at a time, and sample them for the sketch.

    MLPs that lie by neuron are named by the numbers of their layers.
    """
    model, layers, weights = empty.model, empty.layers, wanted.weights
    table, found = empty.names.modules[id(model.get_input_embeddings())], architecture_of(model.config)
    plain_logits = not isinstance(found, str) and found.plain_logits
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
        names[:1], codes[:1] = names[:1] * 2, halves(codes[0])
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
