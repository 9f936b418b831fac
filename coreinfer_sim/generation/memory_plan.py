"""Models under a memory budget: what a run will hold, refused before anything is loaded if it is too much, and loading.

On a CPU dense MLP weights stay on disk, in a neuron-major store; all other weights are read into memory as they are stored.
On a GPU, whose memory the budget then counts, dense MLP weights stay in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import BudgetError, ConfigError, ModelError, UnsupportedModelError
from coreinfer_sim.base.memory import give_back_memory, keep_heap_small, peak_bytes, resident_bytes
from coreinfer_sim.base.progress import Progress, readable_size
from coreinfer_sim.base.settings import Fallback, Mode, parse_layers
from coreinfer_sim.engines.compact import MERGED_ROWS, linear_parameters
from coreinfer_sim.engines.lean.loops import warm_up, warm_up_linear
from coreinfer_sim.index.ranking import n_kept
from coreinfer_sim.models.checkpoint import Checkpoint
from coreinfer_sim.models.loading import DTYPES, LEAN_FAMILIES, LanguageModel, load_model, usable, usable_device
from coreinfer_sim.models.mlps import MLPLayer, dense_bytes, find_mlps, weight_shape
from coreinfer_sim.models.offload import HostLinear, Staging, in_host_memory
from coreinfer_sim.models.store import PartSource, StoreShape, open_or_make, store_path
from coreinfer_sim.models.streaming import SCRATCH, Scratch, StreamedEmbedding, StreamedLinear, StreamedMLP

MIB = 1 << 20
_RESERVE = 32 * MIB
"""What a run holds besides: generate's own objects, holes in the heap, the libraries' work buffers."""
_DEVICE_RESERVE = 128 * MIB
"""The same on a GPU: the libraries' work buffers, holes in the allocator's blocks."""
_MARGIN = 16 * MIB
"""By which two runs differ in what they hold before the model is loaded."""


@dataclass(frozen=True)
class Use:
    """What a run will do with a model, as far as memory depends on it."""

    n_kept: Sequence[int]
    """Neurons of each layer that decode holds at most, [n_layers]; see `most_kept`."""
    n_prompt: int
    """Tokens of the prompt."""
    n_new: int
    """Tokens to generate."""
    compensated: bool = False
    """Whether compensation is merged."""
    n_sequences: int = 1
    """Rows times beams."""
    n_caches: int = 1
    """2 if the selection is refreshed, which holds a second cache."""
    streams: bool = True
    """Whether dense layers are read during prefill."""
    held_twice: bool = False
    """Whether compact weights are also copied to a fixed place, as the compiled engine does."""
    lookup_bytes: int = 0
    """What embedding a prompt takes and gives back before the prompt is read."""


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


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold at its peak."""

    budget: int
    parts: Mapping[str, int]
    """Bytes by what they are for."""
    peak_so_far: int
    n_positions: int
    position_bytes: int
    """What one further position takes."""

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return max(sum(self.parts.values()), self.peak_so_far)

    @property
    def smallest(self) -> int:
        """The smallest budget that surely works, in whole MiB: what is held varies a little between runs."""
        return math.ceil((self.needed + _MARGIN) / MIB) * MIB

    @property
    def position_limit(self) -> int:
        """How many positions, prompt and new tokens together, the budget has room for."""
        return self.n_positions + (self.budget - self.needed) // self.position_bytes

    def check(self) -> None:
        """Raise BudgetError if the budget is too small, with the smallest one that works."""
        if self.needed > self.budget:
            least = f"{self.smallest // MIB}MiB"
            raise BudgetError(
                f"the memory budget is {readable_size(self.budget)}, but this needs {least} ({self.text()}, and "
                f"{_MARGIN // MIB} MiB to be sure); give at least --memory-budget {least}, keep fewer neurons, or ask for a "
                "shorter text."
            )

    def text(self) -> str:
        """Say in one line what the memory is for."""
        return ", ".join(f"{name} {readable_size(n_bytes)}" for name, n_bytes in self.parts.items() if n_bytes)


def plan_budget(
    budget: int, shape: ModelShape, use: Use, base: int, peak_so_far: int = 0, on_device: bool = False
) -> MemoryPlan:
    """Add up what a run will hold.

    Args:
        budget: bytes that it may hold.
        shape: of the model.
        use: what will be done with it.
        base: bytes that the process holds before the model is loaded: libraries and index.
        peak_so_far: the most that it has held until now.
        on_device: the budget is of a device that dense layers pass through two at a time, and neurons are cut outside.
    """
    neuron_bytes = shape.mlp_bytes / (shape.n_layers * shape.d_ff)
    most = max(use.n_kept)
    held = math.ceil(sum(use.n_kept) * neuron_bytes) + shape.n_layers * shape.d_model * shape.itemsize
    # The change of the output weights in 16 bits, and some rows of it, of the weights and of their sum in float32.
    merging = most * (2 * shape.d_model + 12 * MERGED_ROWS) if use.compensated else 0
    width = 5 * (shape.d_ff if use.streams else most) + 16 * shape.d_model
    n_positions = use.n_prompt + use.n_new
    reading = use.n_sequences * (width * max(4, shape.itemsize) + 4 * n_positions)
    cache = use.n_sequences * use.n_caches * shape.cache_bytes
    output_bytes = shape.d_ff * shape.d_model * shape.itemsize
    passing = 2 * shape.mlp_bytes // shape.n_layers if on_device else SCRATCH + output_bytes
    read = reading * use.n_prompt + (passing if use.streams else 0)
    cut = 0 if on_device else math.ceil(most * neuron_bytes) + merging
    passing_by = {
        f"cache of {n_positions} positions": cache * n_positions,
        **({"reading the prompt": read} if read >= cut else {"cutting neurons": cut}),  # one after the other
        "logits": use.n_sequences * 12 * shape.vocabulary,
    }
    parts = {
        "libraries and index": base,
        "weights outside MLPs": shape.other_bytes,
        "kept neurons": held * (2 if use.held_twice else 1),
        **passing_by,
        "embedding prompts": max(0, use.lookup_bytes - sum(passing_by.values())),  # before the rest of a prompt's work
        "reserve": _DEVICE_RESERVE if on_device else _RESERVE,
    }
    return MemoryPlan(budget, parts, peak_so_far, n_positions, cache + reading)


def most_kept(
    n_layers: int,
    d_ff: int,
    modes: Sequence[Mode],
    keep_ratio: float,
    sparse_layers: str = ":",
    fallback: Fallback | None = None,
    fitted: Sequence[int] | None = None,
) -> list[int]:
    """Return the most neurons of each layer that decode may hold.

    Args:
        n_layers: of the model.
        d_ff: of each layer.
        modes: that will be used, one after the other.
        keep_ratio: of sets that are cut by it.
        sparse_layers: slice of the layers that become sparse.
        fallback: what similarity mode does for unfamiliar prompts.
        fitted: neurons of each layer in the compensated sets, where they are used.
    """
    if Mode.DENSE in modes or (Mode.SIMILARITY in modes and fallback is Fallback.DENSE):
        return [d_ff] * n_layers
    sparse, by_ratio = parse_layers(sparse_layers, n_layers), n_kept(keep_ratio, d_ff)
    kept = fitted if fitted is not None else [0] * n_layers
    return [max(by_ratio, kept[number]) if number in sparse else d_ff for number in range(n_layers)]


def load_within(
    name: str,
    budget: int,
    use: Callable[[Any, list[MLPLayer]], Use],
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[LanguageModel, MemoryPlan]:
    """Load a model whose dense MLPs stay on disk, for a run that keeps to a memory budget.

    Args:
        name: local checkpoint folder in safetensors format.
        budget: bytes that this process may hold, as the operating system counts them.
        use: given the tokenizer and the MLPs, of which only the shapes are known yet, says what the run will do.
        dtype: auto or the type of the checkpoint, which is kept.
        device: auto or cpu.
        progress: takes the plan, and progress when the store is made.

    Raises:
        BudgetError: the budget is too small; nothing has been loaded then.
        ConfigError: another dtype or device.
        ModelError: no checkpoint that can be read.
        StoreError: the store cannot be made, or is damaged.
    """
    progress = progress or Progress()
    if device not in ("auto", "cpu"):
        raise ConfigError(f"the device is {device}, expected cpu; load_on_device serves others.")
    checkpoint = Checkpoint(_folder(name))
    model, tokenizer = _empty_model(name, checkpoint)
    stored = model.dtype
    if dtype not in ("auto", "stored") and DTYPES.get(dtype) is not stored:
        raise ConfigError(
            f"the dtype is {dtype}, but under a memory budget weights stay as {name} stores them, in "
            f"{str(stored).removeprefix('torch.')}; leave --dtype out."
        )
    layers = find_mlps(model)
    names = _Names(model, checkpoint)
    streamed_table = names.streams_table()
    shape = model_shape(model, layers, without_table=streamed_table)
    compile_loops = warm_up if model.config.model_type in LEAN_FAMILIES else warm_up_linear
    compile_loops(stored)  # now, so that what they take is counted before the model is loaded
    give_back_memory()
    plan = plan_budget(budget, shape, use(tokenizer, layers), resident_bytes(), peak_bytes())
    plan.check()
    progress.say(f"Memory budget {readable_size(budget)}, planned {readable_size(plan.needed)}: {plan.text()}.")
    keep_heap_small()
    _stream(model, layers, names, progress)
    _load_rest(model, names, streamed_table)
    give_back_memory()
    limit = plan.position_limit
    return LanguageModel(model.eval(), tokenizer, name, find_mlps(model), position_limit=limit), plan


def load_on_device(
    name: str,
    budget: int,
    use: Callable[[Any, list[MLPLayer]], Use],
    dtype: str = "auto",
    device: str = "cuda",
    progress: Progress | None = None,
) -> tuple[LanguageModel, MemoryPlan]:
    """Load a model onto a device with a budget smaller than the model: dense MLPs wait in host memory (`offload`).

    Args:
        name: as `load_model` takes it; the whole model must fit into host memory.
        budget: bytes of the device's memory that this process may hold, as PyTorch's allocator counts them.
        use: as in `load_within`.
        dtype: as in `load_model`; auto: as stored.
        device: of torch.
        progress: takes the plan.

    Raises:
        BudgetError: the budget is too small; nothing has been put on the device then.
        ModelError: as `load_model`.
    """
    place = torch.device(usable_device(device))
    loaded = load_model(name, "stored" if dtype == "auto" else dtype, "cpu")
    model, layers = loaded.model, loaded.layers
    plan = plan_budget(budget, model_shape(model, layers), use(loaded.tokenizer, layers), 0, on_device=True)
    plan.check()
    (progress or Progress()).say(
        f"Memory budget {readable_size(budget)} of {place}, planned {readable_size(plan.needed)}: {plan.text()}."
    )
    if place.type == "cuda":
        total = torch.cuda.get_device_properties(place).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), place)
    _keep_on_host(model, layers, place)
    return replace(loaded, layers=find_mlps(model), position_limit=plan.position_limit), plan


def _keep_on_host(model: Any, layers: Sequence[MLPLayer], device: torch.device) -> None:
    """Move a model to a device, all but its dense MLPs, which pass through it when they are called."""
    parts: list[list[tuple[torch.Tensor, torch.Tensor | None]]] = []
    for layer in layers:
        parts.append([])
        for name in layer.projections:
            weight, bias = linear_parameters(getattr(layer.owner, name))
            parts[-1].append((in_host_memory(weight, device), bias))
            setattr(layer.owner, name, None)  # so that it is neither moved nor held twice
    model.to(device)
    staging = Staging([[weight for weight, _ in layer] for layer in parts], device)
    for layer, kept in zip(layers, parts, strict=True):
        for place, (name, (weight, bias)) in enumerate(zip(layer.projections, kept, strict=True)):
            setattr(layer.owner, name, HostLinear(staging, layer.number, place, weight, bias))


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
    path = Path(name)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{name} is no local checkpoint folder, which is what a memory budget reads; save the model with "
            "save_pretrained, or download it with 'hf download'."
        )
    return path


def _empty_model(name: str, checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Return the model without weights, in the type that most of the checkpoint is stored in, and the tokenizer."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    dtype = max(sizes, key=lambda each: sizes[each])
    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModelError(f"{name} is quantised, expected plain weights under a memory budget.")
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if (checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the model {name!r} cannot be loaded ({reason}); expected a checkpoint folder.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return model, tokenizer


class _Names:
    """What a model's parameters are called in its checkpoint."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.modules = {id(module): name for name, module in model.named_modules()}

    def find(self, name: str) -> str | None:
        """Return the tensor of a parameter; a checkpoint of the bare decoder leaves the first part out."""
        prefix = f"{self.model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), name.replace("lm_head.", "embed_out."))  # the last is GPT-NeoX's
        return next((n for n in names if n in self.checkpoint.tensors), None)

    def of(self, module: Any, parameter: str, expected: tuple[int, ...]) -> str:
        """Return the tensor of a module's parameter.

        Raises:
            ModelError: there is none of this shape.
        """
        name = f"{self.modules[id(module)]}.{parameter}"
        return self.checked(name, expected)

    def checked(self, name: str, expected: tuple[int, ...]) -> str:
        """Return the tensor of a parameter, which must have a shape."""
        found = self.find(name)
        shape = None if found is None else self.checkpoint.tensors[found].shape
        if found is None or shape != expected:
            raise ModelError(
                f"{self.checkpoint.folder} holds {'no' if found is None else f'a {shape}'} tensor {name}, expected "
                f"{expected}; fetch the checkpoint again."
            )
        return found

    def streams_table(self) -> bool:
        """Return whether the embedding table can stay on disk: a plain one that the output head does not share."""
        table = self.model.get_input_embeddings()
        tied = bool(self.model.all_tied_weights_keys)
        return type(table) is nn.Embedding and not tied and self.find(f"{self.modules[id(table)]}.weight") is not None


def _stream(model: Any, layers: list[MLPLayer], names: _Names, progress: Progress) -> None:
    """Make or open the store, and put projections that read from it into the model."""
    shape = StoreShape(
        len(layers),
        layers[0].d_ff,
        3 if layers[0].family.gated else 2,
        layers[0].d_model,
        str(model.dtype).removeprefix("torch."),
    )
    sources = [_sources(layer, names) for layer in layers]
    checkpoint = names.checkpoint
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
            dense = getattr(layer.owner, name)
            bias = None
            if dense.bias is not None:
                bias = checkpoint.read(names.of(dense, "bias", tuple(dense.bias.shape)), model.dtype)
            place = None if name == layer.family.output else layer.family.inputs.index(name)
            streamed[name] = StreamedLinear(mlp, place, weight_shape(dense), bias)
        mlp.bind([streamed[name] for name in layer.family.inputs])
        for name, module in streamed.items():
            setattr(layer.owner, name, module)


def _sources(layer: MLPLayer, names: _Names) -> list[PartSource]:
    """Return where the parts of a layer's neurons are."""
    sources = []
    for name in layer.projections:
        module = getattr(layer.owner, name)
        transposed = isinstance(module, Conv1D)
        tensor = names.of(module, "weight", tuple(module.weight.shape))
        is_output = name == layer.family.output
        sources.append(PartSource(tensor, in_columns=transposed is not is_output))
        if layer.family.fused and not is_output:
            sources.append(PartSource(tensor, first=layer.d_ff))
    return sources


def _load_rest(model: Any, names: _Names, streamed_table: bool) -> None:
    """Read all weights outside the MLPs, tensor by tensor, into memory of their own."""
    checkpoint, tied = names.checkpoint, set(model.all_tied_weights_keys)
    if streamed_table:
        table = model.get_input_embeddings()
        found = names.of(table, "weight", tuple(table.weight.shape))
        model.set_input_embeddings(StreamedEmbedding(checkpoint, found, tuple(table.weight.shape), model.dtype))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, StreamedLinear) or name in tied:
            continue
        value = checkpoint.read(names.checked(name, tuple(parameter.shape)), parameter.dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for name, buffer in model.named_buffers():
        kept = names.find(name)
        if kept is not None and checkpoint.tensors[kept].shape == buffer.shape:
            buffer.copy_(checkpoint.read(kept))
    model.tie_weights()
