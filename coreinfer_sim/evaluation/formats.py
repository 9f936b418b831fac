"""Weights as they come back from llama.cpp's quantised formats: what one would take instead of sparsity.

The model is rounded to a format, or read from another GGUF file of it, and decodes through transformers, in the model's own type;
bytes are those of the format or file. Inputs of matrices are rounded to Q8_0 as well, as ggml does on a CPU before it multiplies
by Q8_0 or Q4_0 (``vec_dot_type`` in its ``ggml-cpu.c``); for K types it takes blocks of 256, which are coarser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.evaluation.contenders import is_file_name
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import MLPLayer, check_dense, find_mlps, module_bytes

BITS = {"q8_0": 8.5, "q4_0": 4.5}
"""Bits a weight, scales included."""
_OF_HEAD = {"q4_0": "q8_0"}
"""Format of the output head where it is another: llama.cpp keeps it at 6 or, where its width does not go into blocks of 256,
8 bits in a file of 4, as much of the quality is there."""
_BLOCK = 32
_AT_ONCE = 1 << 18  # weights, whose float32 blocks stay in the cache


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Round blocks [..., 32] to Q8_0 to the bit as ggml does: halves away from zero, by the scale before it is a float16."""
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = blocks * _inverse(scale)
    whole = codes.int()  # which cuts off as trunc does, at a tenth of its time
    whole += ((codes - whole) * 2).int()
    return whole * scale.half().float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Do so to Q4_0: the largest magnitude becomes -8."""
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15) - 8
    return codes * scale.half().float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, but 0 where float16 holds no such scale: all weights are 0 there."""
    return torch.where(scale.half() == 0, 0, 1 / scale)


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"q8_0": _q8_0, "q4_0": _q4_0}
"""What blocks come back as."""


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight matrix [n_out, n_in] as it comes back from a format, in its own dtype."""
    n_in = weight.shape[1]
    made = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    n_rows = max(1, _AT_ONCE // n_in)
    for part, into in zip(weight.split(n_rows), made.split(n_rows), strict=True):
        blocks = F.pad(part.float(), (0, -n_in % _BLOCK)).unflatten(1, (-1, _BLOCK))
        into.copy_(FORMATS[kind](blocks).flatten(1)[:, :n_in])
    return made


def _round_inputs(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Round a matrix's inputs [..., n_in] to Q8_0, in their own dtype."""
    first, *others = inputs
    n_in = first.shape[-1]
    blocks = F.pad(first.float(), (0, -n_in % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    return (_q8_0(blocks).flatten(-2)[..., :n_in].to(first.dtype), *others)


def _matrices(model: Any) -> list[Any]:
    """Return the modules of a model that multiply by a matrix."""
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def rounded_model(language_model: LanguageModel, kind: str) -> LanguageModel:
    """Return a model whose matrices, and their inputs, are rounded to a format, the output head to that of `_OF_HEAD`."""
    check_dense(language_model.layers, f"rounding to {kind}")
    whole = language_model.model
    matrices = [module.weight for module in _matrices(whole)]
    model = copy.deepcopy(
        whole, {id(weight): weight for weight in matrices}
    )  # these are replaced, and not copied before
    head = model.get_output_embeddings()
    for module in _matrices(model):
        of_module = _OF_HEAD.get(kind, kind) if module is head else kind
        if isinstance(module, torch.nn.Linear):
            made = rounded(module.weight.data, of_module)
        else:  # the weight of a Conv1D lies the other way round
            made = rounded(module.weight.data.T, of_module).T.contiguous()
        module.weight = torch.nn.Parameter(made, requires_grad=False)
        module.register_forward_pre_hook(_round_inputs)
    return replace(language_model, model=model, layers=find_mlps(model))


class FormatEngine(TransformersEngine):
    """Decodes a rounded model; compact MLPs are cut from the whole one, so that compensation is merged before rounding."""

    def __init__(self, whole: Sequence[MLPLayer], rounded_to: LanguageModel, kind: str, config: DecodeConfig) -> None:
        """Decode ``rounded_to``, with MLPs cut from the layers ``whole`` and rounded to ``kind``."""
        super().__init__(rounded_to.model, rounded_to.layers, config)
        self._whole, self._kind = whole, kind

    def cut(self, selection: NeuronSelection) -> Mapping[int, Any]:
        """Cut from the whole layers, then round."""
        made = self.cut_from(self._whole, selection)
        for parts in made.values():
            for module in parts.values():
                module.weight = torch.nn.Parameter(rounded(module.weight.data, self._kind), requires_grad=False)
                module.register_forward_pre_hook(_round_inputs)
        return made

    def mlp_bytes(self, held: Sequence[Prepared]) -> int:
        """Return the MLP bytes of a step in the format."""
        return round(super().mlp_bytes(held) * self._share(self._kind))

    def other_bytes(self) -> int:
        """Return the bytes outside the MLPs in the format."""
        head = self.model.get_output_embeddings()
        head_bytes = 0 if head is None else module_bytes(head)
        others = super().other_bytes() - head_bytes
        return round(others * self._share(self._kind) + head_bytes * self._share(_OF_HEAD.get(self._kind, self._kind)))

    def _share(self, kind: str) -> float:
        return BITS[kind] / (8 * int(self.model.dtype.itemsize))


class FileEngine(TransformersEngine):
    """Decodes another file of the same model, all of it; bytes are the file's."""

    def __init__(self, of_file: LanguageModel, config: DecodeConfig) -> None:
        """Decode ``of_file``, whose name is that of a GGUF file."""
        if is_quantised(Path(of_file.name)):
            for module in _matrices(of_file.model):
                module.register_forward_pre_hook(_round_inputs)
        super().__init__(of_file.model, of_file.layers, config)
        self._mlp, self._other = file_bytes(Path(of_file.name))

    def mlp_bytes(self, held: Sequence[Prepared]) -> int:
        """Return the MLP bytes of a step in the file."""
        return self._mlp

    def other_bytes(self) -> int:
        """Return the bytes outside the MLPs in the file."""
        return self._other


def file_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of a GGUF file that a token reads, of the MLPs and of all else: of embeddings it reads a row."""
    sizes = {str(tensor.name): int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    mlp = sum(size for name, size in sizes.items() if ".ffn_" in name and "norm" not in name)
    return mlp, sum(sizes.values()) - mlp


def is_quantised(path: Path) -> bool:
    """Return whether most weights of a GGUF file lie in blocks."""
    tensors = gguf.GGUFReader(path).tensors
    in_blocks = [tensor for tensor in tensors if gguf.GGML_QUANT_SIZES[tensor.tensor_type][0] > 1]
    return 2 * sum(int(each.n_elements) for each in in_blocks) > sum(int(each.n_elements) for each in tensors)


def _of_file(whole: LanguageModel, name: str) -> LanguageModel:
    """Load another file of a model, in the model's own type."""
    found = load_model(name, whole.dtype_name, str(whole.model.device))
    shapes = [{(layer.d_model, layer.d_ff) for layer in each.layers} for each in (whole, found)]
    words = found.tokenizer.get_vocab()  # in which a file may have filled gaps
    same = all(words.get(word) == number for word, number in whole.tokenizer.get_vocab().items())
    if not same or (len(whole.layers), shapes[0]) != (len(found.layers), shapes[1]):
        raise ConfigError(
            f"{name} holds another model than {whole.name}: layers, widths or vocabulary differ; give a file that was made of "
            f"{whole.name}."
        )
    return found


def engine_for(language_model: LanguageModel, weights: str, config: DecodeConfig) -> tuple[LanguageModel, Engine]:
    """Return what decodes a contender's weights: the engine that decode takes, a rounded model for a file format, or a file.

    Raises:
        ConfigError: no engine can run the model with these weights, or a file holds another model.
    """
    if is_file_name(weights):
        model = _of_file(language_model, weights)
        return model, FileEngine(model, replace(config, engine="transformers"))
    if weights in FORMATS:
        model = rounded_model(language_model, weights)
        return model, FormatEngine(language_model.layers, model, weights, replace(config, engine="transformers"))
    own_codes = getattr(language_model.model, "own_codes", {})
    wide = Weights.BF16 if own_codes else Weights.STORED
    kind = wide if weights == "16bit" else Weights(weights)
    engines, _ = choose_engines(language_model.model, language_model.layers, replace(config, weights=kind))
    return language_model, engines[0]
