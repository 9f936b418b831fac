"""Loading a model under a memory budget.

On a CPU dense MLP weights stay on disk, in a neuron-major store; all other weights are read into memory as they are stored.
On a GPU, whose memory the budget then counts, dense MLP weights stay in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import ConfigError, ModelError, UnsupportedModelError
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.models.checkpoint import Checkpoint
from coreinfer_sim.models.loading import DTYPES, LanguageModel, dtype_name, load_model, usable, usable_device
from coreinfer_sim.models.mlps import MLPLayer, check_dense, dense_bytes, find_mlps, linear_parameters
from coreinfer_sim.models.offload import HostLinear, Staging, in_host_memory
from coreinfer_sim.models.parameters import ParameterNames, empty_model, main_dtype
from coreinfer_sim.models.source import read_config, source_of
from coreinfer_sim.models.store import PartSource, StoreShape, open_or_make, store_path
from coreinfer_sim.models.streaming import Scratch, StreamedEmbedding, StreamedLinear, StreamedMLP
from coreinfer_sim.models.structure import weight_shape
from coreinfer_sim.models.whole import check_whole


@dataclass(frozen=True)
class ModelShape:
    """The bytes of a model's parts."""

    n_layers: int
    d_model: int
    d_ff: int
    itemsize: int
    """Bytes of a weight."""
    mlp_bytes: int
    """All MLPs, dense."""
    other_bytes: int
    """All other weights that stay in memory."""
    cache_bytes: int
    """The cache of one position of one sequence."""
    vocabulary: int


Planner = Callable[[LanguageModel, ModelShape], int]
"""Given a model whose weights are not where they will be yet, says how many positions there is room for, or refuses it."""


def load_within(
    name: str, planner: Planner, dtype: str = "auto", device: str = "auto", progress: Progress | None = None
) -> LanguageModel:
    """Load a model whose dense MLPs stay on disk.

    Args:
        name: local checkpoint folder in safetensors format.
        planner: called before any weights are loaded; what it raises is passed on.
        dtype: auto or the type of the checkpoint, which is kept.
        device: auto or cpu.
        progress: receives progress when the store is made.

    Raises:
        ConfigError: another dtype or device.
        ModelError: no checkpoint that can be read.
        StoreError: the store cannot be made, or is damaged.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"the device is {device}, expected cpu; load_on_device serves others.")
    # 1) The model without weights
    checkpoint = Checkpoint(_folder(name))
    model, tokenizer, notes = empty_model(
        name,
        read_config(name, name, {}),
        name,
        {},
        main_dtype(checkpoint),
        lambda each: ParameterNames(each, checkpoint).tied_as_stored(),
    )
    if dtype_name(dtype) not in ("auto", "stored") and DTYPES[dtype_name(dtype)] is not model.dtype:
        raise ConfigError(
            f"the dtype is {dtype}, but under a memory budget weights stay as {name} stores them, in "
            f"{str(model.dtype).removeprefix('torch.')}; leave dtype at auto."
        )
    layers = find_mlps(model)
    check_dense(layers, "a memory budget")
    names = ParameterNames(model, checkpoint)
    notes += check_whole(name, model, layers, names.found())
    streamed_table = names.streams_table()
    # 2) The plan
    limit = planner(
        LanguageModel(model, tokenizer, name, layers), model_shape(model, layers, without_table=streamed_table)
    )
    # 3) The weights
    _stream(model, layers, names, checkpoint, progress or Progress())
    _load_rest(model, names, checkpoint, streamed_table)
    give_back_memory()
    return LanguageModel(model.eval(), tokenizer, name, find_mlps(model), position_limit=limit, notes=notes)


def load_on_device(
    name: str, budget: int, planner: Planner, dtype: str = "auto", device: str = "cuda"
) -> LanguageModel:
    """Load a model onto a device with a budget smaller than the model: dense MLPs wait in host memory (`offload`).

    Args:
        name: as `load_model` takes it; the whole model must fit into host memory.
        budget: bytes of the device's memory that this process may hold, as PyTorch's allocator counts them.
        planner: called before anything is put on the device; what it raises is passed on.
        dtype: as in `load_model`; auto: as stored.
        device: of torch.

    Raises:
        ModelError: as `load_model`.
    """
    place = torch.device(usable_device(device))
    loaded = load_model(name, "stored" if dtype == "auto" else dtype, "cpu")
    model, layers = loaded.model, loaded.layers
    check_dense(layers, "a memory budget")
    limit = planner(loaded, model_shape(model, layers))
    if place.type == "cuda":
        total = torch.cuda.get_device_properties(place).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), place)
    keep_on_host(model, layers, place)
    return replace(loaded, layers=find_mlps(model), position_limit=limit)


def keep_on_host(model: Any, layers: Sequence[MLPLayer], device: torch.device) -> None:
    """Move a model to a device, all but its dense MLPs, which pass through it when they are called."""
    parts: list[list[tuple[torch.Tensor, torch.Tensor | None]]] = []
    for layer in layers:
        parts.append([])
        for name in layer.projections:
            weight, bias = linear_parameters(layer.projection(name))
            parts[-1].append((in_host_memory(weight, device), bias))
            layer.put(name, None)  # so that it is neither moved nor held twice
    model.to(device)
    staging = Staging([[weight for weight, _ in layer] for layer in parts], device)
    for layer, kept in zip(layers, parts, strict=True):
        for place, (name, (weight, bias)) in enumerate(zip(layer.projections, kept, strict=True)):
            layer.put(name, HostLinear(staging, layer.number, place, weight, bias))


def model_shape(model: Any, layers: list[MLPLayer], without_table: bool = False) -> ModelShape:
    """Return the bytes of a model's parts, which may have no weights yet.

    Args:
        model: the model.
        layers: its MLPs.
        without_table: its embedding table stays on disk.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    tied = set(model.all_tied_weights_keys)
    every = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n not in tied)
    table = model.get_input_embeddings().weight
    itemsize = model.dtype.itemsize
    return ModelShape(
        n_layers=len(layers),
        d_model=layers[0].d_model,
        d_ff=layers[0].d_ff,
        itemsize=itemsize,
        mlp_bytes=dense_bytes(layers),
        other_bytes=every - dense_bytes(layers) - (table.numel() * itemsize if without_table else 0),
        cache_bytes=2 * len(layers) * kv_heads * head_dim * itemsize,
        vocabulary=table.shape[0],
    )


def _folder(name: str) -> Path:
    source_of(name)
    if not Path(name).is_dir():
        raise ModelError(
            f"{name} is no local checkpoint folder, which is what a memory budget reads; save the model with "
            "save_pretrained, or download it with 'hf download'."
        )
    return Path(name)


def _stream(
    model: Any, layers: list[MLPLayer], names: ParameterNames, checkpoint: Checkpoint, progress: Progress
) -> None:
    """Make or open the store, and put projections that read from it into the model."""
    shape = StoreShape(
        len(layers),
        layers[0].d_ff,
        3 if layers[0].gated else 2,
        layers[0].d_model,
        str(model.dtype).removeprefix("torch."),
    )
    sources = [_sources(layer, names) for layer in layers]
    for source in (s for parts in sources for s in parts):
        if checkpoint.tensors[source.tensor].dtype is not model.dtype:
            raise UnsupportedModelError(
                f"{source.tensor} is stored in {checkpoint.tensors[source.tensor].dtype}, expected {model.dtype} as most "
                "weights; save the model in one type."
            )
    store = open_or_make(store_path(checkpoint), checkpoint, sources, shape, progress)
    scratch = Scratch(store.layers[0], usable(model.dtype, "cpu"))
    for layer, own in zip(layers, store.layers, strict=True):
        mlp = StreamedMLP(own, scratch)
        streamed = {}
        for name in layer.projections:
            dense = layer.projection(name)
            bias = None
            if dense.bias is not None:
                bias = checkpoint.read(names.of(dense, "bias"), model.dtype)
            place = None if name == layer.output_name else layer.inputs.index(name)
            streamed[name] = StreamedLinear(mlp, place, weight_shape(dense), bias)
        mlp.bind([streamed[name] for name in layer.inputs])
        for name, module in streamed.items():
            layer.put(name, module)


def _sources(layer: MLPLayer, names: ParameterNames) -> list[PartSource]:
    """Return where the parts of a layer's neurons are."""
    sources = []
    for name in layer.projections:
        module = layer.projection(name)
        transposed = isinstance(module, Conv1D)
        tensor = names.of(module, "weight")
        is_output = name == layer.output_name
        sources.append(PartSource(tensor, in_columns=transposed is not is_output))
        if layer.fused and not is_output:
            sources.append(PartSource(tensor, first=layer.d_ff))
    return sources


def _load_rest(model: Any, names: ParameterNames, checkpoint: Checkpoint, streamed_table: bool) -> None:
    """Read all weights outside the MLPs, tensor by tensor, into memory of their own."""
    tied = names.tied
    if streamed_table:
        table = model.get_input_embeddings()
        place = names.of(table, "weight")
        model.set_input_embeddings(StreamedEmbedding(checkpoint, place, tuple(table.weight.shape), model.dtype))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, StreamedLinear) or name in tied:
            continue
        value = checkpoint.read(names.of(module, leaf), parameter.dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for name, buffer in model.named_buffers():
        kept = names.find(name)
        if kept is not None and checkpoint.tensors[kept].shape == buffer.shape:
            buffer.copy_(checkpoint.read(kept))
    model.tie_weights()
