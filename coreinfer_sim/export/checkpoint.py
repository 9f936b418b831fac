"""Export as a checkpoint of stock transformers: no code of ours is needed to load it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import ExportError
from coreinfer_sim.export.weights import CompactWeights, Source
from coreinfer_sim.models.loading import LanguageModel

SOURCE_FILE = "coreinfer_sim.json"


def source_of(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says it was exported from; nothing if it does not."""
    try:
        found: dict[str, Any] = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def check_exportable(language_model: LanguageModel, with_bias: bool) -> None:
    """Raise ExportError unless a checkpoint of stock transformers can hold the compact MLPs.

    Args:
        language_model: the dense model.
        with_bias: whether the compact MLPs have biases that the dense ones lack, as compensation brings.
    """
    _target_of(language_model).config(language_model.model.config, 1, with_bias)


def export_checkpoint(language_model: LanguageModel, weights: CompactWeights, source: Source, out: Path) -> None:
    """Write a checkpoint folder with tokenizer and generation config.

    Args:
        language_model: the dense model.
        weights: cut down to one width.
        source: what is exported.
        out: a new folder.

    Raises:
        ExportError: the family has no configuration for what the compact MLPs need.
    """
    config = _target_of(language_model).config(language_model.model.config, weights.widths[0], weights.has_bias)
    config.use_cache = True  # whatever training has left there
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=language_model.model.dtype)
    fitting = _fitting(model, weights)
    _check_shapes(model, fitting, language_model)
    model.load_state_dict(fitting, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(language_model.model.generation_config)
    model.generation_config.use_cache = True
    model.save_pretrained(out)
    language_model.tokenizer.save_pretrained(out)
    (out / SOURCE_FILE).write_text(json.dumps(asdict(source), indent=2) + "\n", encoding="utf-8")


def _fitting(model: Any, weights: CompactWeights) -> dict[str, torch.Tensor]:
    """Return parameters as a model of the target's architecture lays them out; biases that it adds are zero."""
    fitting, parameters = {}, weights.parameters
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, expected in model.state_dict().items():
        value = parameters.get(name)
        if value is None:
            assert name.endswith(".bias"), name
            value = torch.zeros(expected.shape, dtype=expected.dtype)
        value = value.clone() if value.is_inference() else value  # which cannot become a parameter
        is_transposed = name in transposed and name in weights.mlp_weights  # the shape does not say it of square ones
        fitting[name] = value.T.contiguous() if is_transposed else value
    return fitting


def _check_shapes(model: Any, fitting: Mapping[str, torch.Tensor], language_model: LanguageModel) -> None:
    """Raise ExportError if a type's configuration has not set the width of its MLPs alone."""
    family = language_model.layers[0].family
    for name, expected in model.state_dict().items():
        if fitting[name].shape != expected.shape:
            raise ExportError(
                f"the configuration of {family} models gives {name} the shape {list(expected.shape)}, but the compact model has "
                f"{list(fitting[name].shape)}, so that it cannot hold compact MLPs; run the set with generate."
            )


@dataclass(frozen=True)
class _Target:
    """How a family's configuration names the width, and which configuration lets the MLPs have biases."""

    width: str = "intermediate_size"
    with_bias: Callable[[Any], Any] | None = None

    def config(self, config: Any, width: int, with_bias: bool) -> Any:
        """Return the configuration of the exported model."""
        if with_bias and self.with_bias is None:
            raise ExportError(
                f"compensation needs MLPs with biases, which {config.model_type} models cannot have in transformers; "
                "export without compensation, or run the set with generate."
            )
        config = self.with_bias(config) if with_bias and self.with_bias else copy.deepcopy(config)
        setattr(config, self.width, width)
        return config


def _target_of(language_model: LanguageModel) -> _Target:
    family = language_model.layers[0].family
    if family == "bloom":
        raise ExportError(
            "Bloom's configuration in transformers fixes the width of the MLP to four times the hidden size, so that it "
            "cannot hold compact MLPs; run the set with generate."
        )
    return _TARGETS.get(family, _Target())


def _as_llama(config: Any) -> Any:
    """Return the configuration of the Llama model that computes the same, with biases in its MLPs.

    Qwen2's attention has biases for queries, keys and values; Llama's has one for the output as well, which stays zero.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ExportError(
            f"the model attends to a window of {window} positions only, which its equivalent with biases in the MLPs, Llama, "
            "cannot; export without compensation, or run the set with generate."
        )
    given = config.to_dict()
    names = set(LlamaConfig().to_dict()) - {"architectures", "transformers_version", "model_type"}
    fields = {name: value for name, value in given.items() if name in names}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    return LlamaConfig(**{**fields, "attention_bias": attention_bias, "mlp_bias": True})


def _with(name: str) -> Callable[[Any], Any]:
    def changed(config: Any) -> Any:
        config = copy.deepcopy(config)
        setattr(config, name, True)
        return config

    return changed


_TARGETS = {
    "llama": _Target(with_bias=_with("mlp_bias")),
    "mistral": _Target(with_bias=_as_llama),
    "qwen2": _Target(with_bias=_as_llama),
    "opt": _Target(width="ffn_dim", with_bias=_with("enable_bias")),
    "gpt2": _Target(width="n_inner"),
    "falcon": _Target(width="ffn_hidden_size", with_bias=_with("bias")),
    "starcoder2": _Target(with_bias=_with("use_bias")),
}
"""Families that are not named call the width intermediate_size and have no biases to switch on."""
