"""What transformers calls the tensors of a GGUF file, and how they differ there from its parameters."""

from __future__ import annotations

import copy
from typing import Any

import gguf
import numpy as np
from accelerate import init_empty_weights

from coreinfer_sim.models.mending import mend_config
from coreinfer_sim.models.source import auto_class

TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "nemotron", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2")
"""Model types whose files hold transformers' matrices row by row, in the order that is known here."""
_ROTATED_BY_PAIRS = ("llama", "mistral")
"""Those whose files hold the features of a query's or key's head as pairs, where transformers holds them as halves."""
_NORMS_FROM_ONE = ("gemma2", "gemma3_text", "nemotron")
"""Those whose norms multiply by one more than transformers' weights; files hold what they multiply by."""


class GGUFNames:
    """The names of a file's tensors; one of an unknown type has none."""

    def __init__(self, reader: gguf.GGUFReader, config: Any, model: Any = None) -> None:
        """Compare a file with the modules of a model.

        Args:
            reader: of the file.
            config: of the model.
            model: without weights or with them; None: it is made of the configuration.
        """
        self._config = config
        self.modules: dict[str, str] = {}
        """Modules of the model by what the file calls them, such as ``blk.0.attn_q``."""
        if config.model_type not in TYPES:
            return
        if model is None:
            own = copy.deepcopy(config)
            mend_config(own)  # the model that is decoded says what was mended
            with init_empty_weights():
                model = auto_class(own).from_config(own)
        architecture = reader.fields["general.architecture"].contents()
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        for name, module in model.named_modules():
            found = names.get_name(name) if module._parameters else None
            if found is not None:
                self.modules[found] = name

    def find(self, tensor: str) -> str | None:
        """Return the parameter that a tensor of the file is, or None if it is none."""
        stem, _, leaf = tensor.rpartition(".")
        return f"{self.modules[stem]}.{leaf}" if stem in self.modules else None

    def order(self, tensor: str, n_out: int) -> np.ndarray[Any, Any] | None:
        """Return which row of the file each output of a tensor is; None: they are in order."""
        config, part = self._config, tensor.split(".")[-2]
        n_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
        if n_heads is None or config.model_type not in _ROTATED_BY_PAIRS:
            return None
        order: np.ndarray[Any, Any] = np.arange(n_out).reshape(int(n_heads), -1, 2).swapaxes(1, 2).reshape(-1)
        return order

    def added(self, tensor: str) -> float:
        """Return what the file's values are greater by than the parameter's."""
        return float(tensor.endswith("norm.weight") and self._config.model_type in _NORMS_FROM_ONE)
