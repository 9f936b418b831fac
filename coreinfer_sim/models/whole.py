"""Whether the tensors that were found are those of the model: what lacks, what is too many, and what has another shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.source import gguf_header, quantised

_SHOWN = 3
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|(self_)?attn\.bias|(self_)?attention\.bias|position_ids|_extra_state|(cos|sin)_cached"
    r"|rope_freqs\.weight|attn_rot_embd\.weight)$"
)
"""What earlier releases stored of what the code computes by itself."""
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale\w*|weight_zero_point|absmax|quant_map|SCB|\w+_blocks)$"
)
_UNMERGED = re.compile(r"\.lora_[AB]\b|\.base_layer\.")


@dataclass(frozen=True)
class Found:
    """What reading a checkpoint into a model found."""

    missing: Collection[str]
    """Of the model's tensors; without those that are tied to others or made by the model."""
    unexpected: Collection[str]
    """Tensors that the model has no place for."""
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]] = ()
    """Name, shape that was found, shape that the model has."""


def check_whole(name: str, model: Any, layers: Sequence[MLPLayer], found: Found) -> list[str]:
    """Refuse a model that is not whole, or whose configuration is another one's.

    Args:
        name: of the model, for messages.
        model: as its configuration describes it.
        layers: its MLPs.
        found: what its checkpoint holds.

    Returns:
        A note on the tensors that are passed over, if there are such.

    Raises:
        ModelError: something is missing, has another shape, or is too many in the decoder's own parts.
        UnsupportedModelError: the weights are quantised.
    """
    unexpected = sorted(found.unexpected, key=_natural)
    own = [each for each in unexpected if _is_of_decoder(each, model, layers)]
    telling = next(filter(_QUANTISED.search, own), None)
    if telling is not None:
        raise quantised(name, f"as tensors such as {telling} say")
    if any(map(_UNMERGED.search, unexpected)):
        raise ModelError(
            f"{name} holds an adapter that is not merged into the weights ({_listed(unexpected)}); load it with peft, merge "
            "it with merge_and_unload, and save the result."
        )
    if found.missing:
        raise _lacks(name, model, sorted(found.missing, key=_natural), unexpected)
    if found.mismatched:
        shown, stored, expected = min(found.mismatched)
        raise ModelError(
            f"{name} holds {counted(len(found.mismatched), 'tensor')} of another shape than its configuration says: {shown} "
            f"of {list(stored)}, expected {list(expected)}; fetch configuration and weights of one model."
        )
    if own:
        raise ModelError(
            f"{name} holds {counted(len(own), 'tensor')} that its configuration has no place for ({_listed(own)}), so that "
            "one of the two is another model's; fetch configuration and weights of one model."
        )
    if unexpected:
        return [
            f"Note: {counted(len(unexpected), 'tensor')} of {name} passed over, as no part of its decoder "
            f"({_listed(unexpected)})."
        ]
    return []


def unread_tensors(path: Path, model: Any) -> set[str]:
    """Return the tensors of a GGUF file that transformers passes over without a word when it reads it into ``model``."""
    try:
        from transformers import modeling_gguf_pytorch_utils as of_gguf
    except ImportError:  # a release whose one way of reading says what it passed over
        return set()
    reading: Any = of_gguf
    fields, names = gguf_header(path)
    architecture = fields["general.architecture"]
    processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config=model.config.to_dict())
    read = reading.get_gguf_hf_weights_map(model, processor)
    return names - {*read, "output.weight"}  # which GPT-2's own reading takes


def _lacks(name: str, model: Any, missing: list[str], unexpected: list[str]) -> ModelError:
    n_all = len(model.state_dict())
    also = f", but holds {len(unexpected)} others ({_listed(unexpected)})" if unexpected else ""
    head = model.get_output_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    tie = ""
    if head is not None and missing == [f"{names[id(head)]}.weight"]:
        tie = ", or set tie_word_embeddings in its config.json if the output head is the embedding table"
    return ModelError(
        f"{name} lacks {len(missing)} of the {n_all} tensors of its model ({_listed(missing)}){also}; fetch it again, whole"
        f"{tie}."
    )


def _is_of_decoder(tensor: str, model: Any, layers: Sequence[MLPLayer]) -> bool:
    """Return whether a tensor lies in one of the decoder's layers, or in a part of the model that has weights."""
    if _BUFFERS.search(tensor):
        return False
    if tensor.startswith("blk."):  # GGUF's name for a layer
        return True
    modules, owner = dict(model.named_modules()), layers[0].path
    list_name = owner[: re.search(r"\.\d+(\.|$)", owner).start()]  # type: ignore[union-attr]
    for name in (tensor, f"{model.base_model_prefix}.{tensor}"):  # a checkpoint of the bare decoder
        place = re.match(rf"{re.escape(list_name)}\.(\d+)\.", name)
        if place:
            n_predicting = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
            n_layers = layers[-1].block + 1
            return not n_layers <= int(place[1]) < n_layers + n_predicting
        part = modules.get(name.rpartition(".")[0])
        if part is not None and not any(True for _ in part.children()):
            return True
    return False


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _natural(name: str) -> list[tuple[int, str]]:
    """Order numbers in names by their values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
