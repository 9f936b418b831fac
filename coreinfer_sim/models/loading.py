"""Loading a causal language model and its tokenizer: hub id, local checkpoint or GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.base.hub import NO_CODE
from coreinfer_sim.models.gguf_codes import main_dtype, own_codes
from coreinfer_sim.models.gguf_names import GGUFNames
from coreinfer_sim.models.gguf_reading import read_once
from coreinfer_sim.models.mending import mend, mend_config
from coreinfer_sim.models.mlps import MLPLayer, find_mlps
from coreinfer_sim.models.source import (
    ADAPTER_FILE,
    auto_class,
    check_no_adapter,
    holds_fp8,
    load_errors,
    read_config,
    source_of,
)
from coreinfer_sim.models.whole import Found, check_whole, unread_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPELLINGS = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal language model with what is needed around it."""

    model: Any
    tokenizer: Any
    name: str
    """What the user called it: hub id, folder or GGUF file."""
    layers: list[MLPLayer]
    position_limit: int | None = None
    """Positions that a memory budget has room for."""
    notes: Sequence[str] = ()
    """What was passed over or mended when it was loaded, one line each."""

    @property
    def context_length(self) -> int | None:
        """Largest number of positions, or None where neither the model (ALiBi) nor a memory budget sets one."""
        limits = [n for n in (context_length(self.model), self.position_limit) if n is not None]
        return min(limits, default=None)

    @property
    def dtype_name(self) -> str:
        """The weights' type, such as ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a type in any spelling: ``bf16``, ``torch.bfloat16`` or torch's own object is ``bfloat16``.

    Raises:
        ModelError: it is none of auto, stored, float32, bfloat16 and float16.
    """
    given = str(dtype).lower().removeprefix("torch.")
    name = _SPELLINGS.get(given, given)
    if name not in ("auto", "stored", *DTYPES):
        raise ModelError(f"dtype is {str(dtype)!r}, expected one of auto, stored, {', '.join(DTYPES)}.")
    return name


def context_length(model: Any) -> int | None:
    """Return the largest number of positions of a model, or None where it states none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a sha256 over the vocabulary, which decides what token ids mean."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()


@read_once()
def load_model(
    name: str, dtype: str | torch.dtype = "auto", device: str = "auto", as_stored: bool = False
) -> LanguageModel:
    """Load a model for inference.

    Args:
        name: hub id, local checkpoint folder, or a ``.gguf`` file, which is dequantised.
        dtype: float32, bfloat16, float16 in any spelling (`dtype_name`), stored (bfloat16 for quantised GGUF), or auto: as
            stored, but float32 on a CPU that has no instructions for the stored type and would be several times slower in it.
        device: torch device, or auto: a GPU where there is one.
        as_stored: with ``auto``, weights stay as stored on any CPU, for engines whose products read 16 bits everywhere;
            GPT-2's transposed matrices are not among them.

    Raises:
        ModelError: nothing there, nothing that transformers can load, or no whole model; no such device.
        UnsupportedModelError: the family has no adapter, or the weights are quantised.
    """
    dtype = dtype_name(dtype)
    device = usable_device(device)
    transformers_logging.disable_progress_bar()
    # 1) configuration and tokenizer
    source, options = source_of(name)
    config = read_config(name, source, options, fp8=True)
    notes = mend_config(config) + _widened_fp8(name, config) + _text_part(name, config)
    of_gguf = main_dtype(options["gguf_file"]) if options else None
    if of_gguf is not None and not (dtype == "stored" or as_stored):
        of_gguf = usable(of_gguf, device)
    wanted = DTYPES.get(dtype, of_gguf or "auto")
    # 2) the weights
    with load_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **NO_CODE)
        loaded: Any = auto_class(config).from_pretrained(
            source,
            config=config,
            dtype=wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
            **NO_CODE,
            **_dense_gguf(options),
        )
        model, read = loaded
        if getattr(model, "_hf_peft_config_loaded", False):
            check_no_adapter(name)
        if dtype == "auto" and not (as_stored and not any(isinstance(module, Conv1D) for module in model.modules())):
            native = usable(model.dtype, device)
            # Not else: rotary frequencies, which stay float32 in a model of 16 bits, would be rounded.
            if native is not model.dtype:
                model = model.to(native)
        model = model.to(device).eval()
        if options:
            reader = gguf.GGUFReader(options["gguf_file"])
            model.own_codes = own_codes(reader, GGUFNames(reader, config, model), config.tie_word_embeddings)
        unread = unread_tensors(Path(options["gguf_file"]), model) if options else set()
    layers = find_mlps(model)
    found = Found(read["missing_keys"], read["unexpected_keys"] | unread, read["mismatched_keys"])
    notes += check_whole(name, model, layers, found)
    # 3) what decode needs of them
    compact_head_inputs(model)
    notes += mend(model, tokenizer)
    if Path(name, ADAPTER_FILE).is_file():
        notes.append(f"Note: {name} holds an adapter beside the whole model; it is passed over.")
    return LanguageModel(model, tokenizer, name, layers, notes=notes)


def _widened_fp8(name: str, config: Any) -> list[str]:
    """Ask transformers to widen weights in FP8, and return a note if there are such."""
    if not holds_fp8(config):
        return []
    rows, columns = config.quantization_config["weight_block_size"]
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    return [f"Note: the weights of {name} are FP8 with a scale for each {rows} × {columns}; they are widened."]


def _text_part(name: str, config: Any) -> list[str]:
    """Return a note on which part of a model is used, if it has further ones."""
    text = config.get_text_config()
    if text is config or type(text) is type(config):
        return []
    return [
        f"Note: {name} is a {config.model_type} model, of which the part that reads text ({text.model_type}) is used."
    ]


def compact_head_inputs(model: Any) -> None:
    """Let the output head of a model get hidden states that lie side by side."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_packed)


def _packed(_head: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Give the output head hidden states with the strides of their shape.

    Those of a text's last position alone keep the strides of the whole text, for which torch multiplies batch by batch and
    copies the head: in bfloat16 1.3 seconds a prompt for 151,936 words and 1,536 features, in place of 0.02.
    """
    hidden = given[0]
    return hidden.flatten(0, -2).contiguous().unflatten(0, hidden.shape[:-1]), *given[1:]


def usable_device(name: str) -> str:
    """Return the device that ``name`` asks for, if tensors can lie on it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch asserts that it was built with CUDA
        found = "cpu and cuda" if torch.cuda.is_available() else "cpu, and no GPU that this torch can use"
        raise ModelError(
            f"the device {name!r} cannot be used, as this machine has {found}; give one of those."
        ) from error
    return name


@read_once()
def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model alone; ``name`` is as in `load_model`.

    Raises:
        ModelError: nothing there, or nothing that transformers can load.
    """
    source, options = source_of(name)
    with load_errors(name, "tokenizer of"):
        return AutoTokenizer.from_pretrained(source, **options, **NO_CODE)


def usable(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return ``dtype``, or float32 where the device is a CPU that lacks instructions for it."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return dtype
    if dtype is torch.bfloat16:
        return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if dtype is torch.float16:
        return dtype if torch.ops.mkldnn._is_mkldnn_fp16_supported() else torch.float32
    return dtype


def _dense_gguf(options: dict[str, str]) -> dict[str, Any]:
    """Ask for dense weights where transformers would otherwise keep a GGUF file's blocks packed."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config and "gguf_file" in options else {}
