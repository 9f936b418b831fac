"""Calls of ``generate`` that sparse decode cannot honour, each refused with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from coreinfer_sim.base.errors import GenerationError, PromptError
from coreinfer_sim.models.mending import outside

_ARGUMENTS = {
    "assistant_model": "assisted decoding reads drafts of several tokens in one step",
    "custom_generate": "a custom generate loop need not tell prefill from decode",
    "encoder_outputs": "only causal models are supported",
    "inputs_embeds": "routing and statistics read token ids",
}
_SETTINGS = {
    "prompt_lookup_num_tokens": "prompt-lookup decoding reads drafts of several tokens in one step",
    "assistant_early_exit": "early-exit drafts are read several in one step",
    "guidance_scale": "guidance reads a second, unconditional prompt",
}


class CallSettings:
    """What transformers will use in a call: the argument, be it None, else the given config, else the model's own."""

    def __init__(self, model: Any, given: Mapping[str, Any]) -> None:
        """Look among the arguments ``given`` to ``generate`` first."""
        self._given = given
        self._config, self._own = given.get("generation_config"), model.generation_config

    def get(self, name: str) -> Any:
        """Return the value of a setting."""
        asked = self.asked(name)
        return asked if asked is not None or name in self._given else getattr(self._own, name, None)

    def asked(self, name: str) -> Any:
        """Return the value that the call itself gives to a setting, whatever the model's own is."""
        return self._given[name] if name in self._given else getattr(self._config, name, None)

    def mask_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tell padding in the ids as transformers does: by the padding token, unless it also ends texts."""
        pad, eos = self.get("pad_token_id"), self.get("eos_token_id")
        ends = eos if isinstance(eos, list) else [eos]
        if pad is None or pad in ends:
            return torch.ones_like(input_ids)
        return input_ids.ne(pad).long()

    def refuse(self) -> None:
        """Raise GenerationError for what sparse decode cannot honour."""
        for name, reason in _ARGUMENTS.items():
            if self._given.get(name) is not None:
                raise GenerationError(f"{name} does not go with sparse decode, as {reason}; leave it out.")
        if self.asked("use_cache") is False:
            raise GenerationError(
                "use_cache is False, but sparse decode needs the cache to tell prefill from decode; leave it on."
            )
        for name, reason in _SETTINGS.items():
            value = self.get(name)
            if value is not None and (name != "guidance_scale" or value != 1):
                raise GenerationError(f"{name} does not go with sparse decode, as {reason}; leave it out.")


def check_ids(input_ids: Any, mask: torch.Tensor | None, n_rows: int | None = None) -> None:
    """Check the token ids of a call.

    Args:
        input_ids: [n_rows, n_positions].
        mask: 0 where a position is padding, like the ids.
        n_rows: of the embedding table.

    Raises:
        GenerationError: they are none, or are padded on the right.
        PromptError: one stands for no row of the table.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise GenerationError("generate was given no token ids, expected input_ids of [n_rows, n_positions].")
    if mask is None:
        return
    if mask.shape != input_ids.shape:
        raise GenerationError(
            f"the attention mask has the shape {tuple(mask.shape)}, expected that of the ids, {tuple(input_ids.shape)}."
        )
    if not bool(mask[:, -1].all()):
        raise GenerationError("a row ends in padding, expected padding on the left; set padding_side='left'.")
    strange = input_ids[mask.bool() & outside(input_ids, n_rows)] if n_rows is not None else input_ids[:0]
    if len(strange) > 0:
        raise PromptError(
            f"the ids hold {int(strange[0])}, expected 0 to {n_rows - 1 if n_rows else 0}, the rows of the embedding table; "
            "take the model's own tokenizer, and mask what is padding."
        )
