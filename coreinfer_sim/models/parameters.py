"""A model without weights, and what its parameters are called where they lie."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights

from coreinfer_sim.base.hub import NO_CODE
from coreinfer_sim.base.memory import keep_heap_small
from coreinfer_sim.models.mending import mend, mend_config
from coreinfer_sim.models.source import auto_class, load_errors
from coreinfer_sim.models.whole import Found


class Stored(Protocol):
    """A tensor that has not been read."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...


class Tensors(Protocol):
    """The tensors of a model, one of which is read at a time."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Those in floating point, by name."""
        ...

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a whole tensor, in another dtype if one is named."""
        ...

    def same(self, one: str, other: str) -> bool:
        """Return whether two tensors hold the same values."""
        ...


def main_dtype(tensors: Tensors) -> torch.dtype:
    """Return the type of most weights."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda each: sizes[each], default=torch.float32)


def empty_model(
    name: str,
    config: Any,
    source: str,
    options: dict[str, str],
    dtype: torch.dtype,
    tied: Callable[[Any], bool],
) -> tuple[Any, Any, list[str]]:
    """Return a model without weights, its tokenizer, and what was mended.

    Args:
        name: what the user called it.
        config: of `read_config`; it is mended.
        source: what ``from_pretrained`` takes, see `source_of`.
        options: its further options.
        dtype: of the weights.
        tied: says of such a model whether the weights that it ties are stored as one.
    """
    from accelerate import init_empty_weights

    # Parameters take real memory until they are moved to no device at all: as holes in the heap that would take up later tensors,
    # page after page, without giving any back.
    keep_heap_small()
    notes = mend_config(config)
    with load_errors(name):
        # random numbers for weights that are not there would take half a second of every start
        with init_empty_weights(), no_init_weights():
            model = auto_class(config).from_config(config, dtype=dtype)
            if not tied(model):  # transformers leaves those untied, too
                untie(config)
                model = auto_class(config).from_config(config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **NO_CODE)
        if Path(source, "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model, tokenizer, [*notes, *mend(model, tokenizer)]


def untie(config: Any) -> None:
    """Let a configuration's embeddings and output head be two tensors."""
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False


class ParameterNames:
    """What a model's parameters are called in its checkpoint."""

    def __init__(self, model: Any, checkpoint: Tensors) -> None:
        """Compare a model, which may have no weights, with its checkpoint."""
        self.model, self.checkpoint = model, checkpoint
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        """The tensor that a tied one shares."""

    def find(self, name: str) -> str | None:
        """Return the tensor of a parameter; a checkpoint of the bare decoder leaves the first part out."""
        sharing = (each for each, source in self.tied.items() if source == name)  # stored in its place
        return next((found for found in map(self._stored, (name, *sharing)) if found is not None), None)

    def _stored(self, name: str) -> str | None:
        prefix = f"{self.model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), name.replace("lm_head.", "embed_out."))  # the last is GPT-NeoX's
        return next((n for n in names if n in self.checkpoint.tensors), None)

    def tied_as_stored(self) -> bool:
        """Return whether no tensor is stored that differs from the one that it shares."""
        pairs = [(self._stored(each), self._stored(source)) for each, source in self.tied.items()]
        return all(not one or not other or self.checkpoint.same(one, other) for one, other in pairs)

    def found(self) -> Found:
        """Compare the model's tensors with those of the checkpoint, as transformers does when it loads them."""
        expected = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        places = {name: self.find(self.tied.get(name, name)) for name in expected}
        passed = [f"({each})" for each in self.model._keys_to_ignore_on_load_unexpected or ()]
        taken = {each for each in places.values() if each} | {each for each in map(self._stored, expected) if each}
        others = self.checkpoint.names - taken
        shapes = {name: self.checkpoint.tensors[place].shape for name, place in places.items() if place}
        return Found(
            missing={name for name, place in places.items() if place is None},
            unexpected={each for each in others if not (passed and re.search("|".join(passed), each))},
            mismatched=[(name, shape, expected[name]) for name, shape in shapes.items() if shape != expected[name]],
        )

    def of(self, module: Any, parameter: str) -> str:
        """Return the tensor of a module's parameter."""
        found = self.find(f"{self.modules[id(module)]}.{parameter}")
        assert found is not None  # as the model is whole
        return found

    def streams_table(self) -> bool:
        """Return whether the embedding table can stay on disk: a plain one that the output head does not share."""
        table = self.model.get_input_embeddings()
        return type(table) is nn.Embedding and not self.tied
