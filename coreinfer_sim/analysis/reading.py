"""Passes of the model over the texts of a block: their activations as they are, or their loss where neurons are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from coreinfer_sim.analysis.texts import Batch, batches
from coreinfer_sim.base.errors import ConfigError, ModelError
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import members_within
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.taps import edited_activations, recorded_activations

_TOKENS_AT_ONCE = 2048
_SCORED_AT_ONCE = 512
"""Tokens whose logits over the whole vocabulary are in memory together."""

Sink = Callable[[int, torch.Tensor, Batch], None]
"""Takes a layer's place, its activations [n_tokens, d_ff] without padding, and the batch that they are of."""
Edit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a layer's place, its activations [n, d_ff], and where in the batch each of them is, row after row, padding included;
returns what the output projection reads."""


@dataclass(frozen=True)
class Reader:
    """A loaded model, and which of its layers are looked at."""

    language_model: LanguageModel
    layers: Sequence[MLPLayer]
    max_tokens: int
    """Longer texts are cut."""

    @classmethod
    def of(cls, language_model: LanguageModel, layers: str, max_tokens: int) -> Reader:
        """Choose the layers by a slice.

        Raises:
            ConfigError: it names none, or the model's context is shorter than texts may be.
        """
        blocks = [layer.block for layer in language_model.layers]
        numbers = members_within(layers, blocks)
        if not numbers:
            raise ConfigError(f"layers is {layers!r}, which names none of {len(set(blocks))} layers.")
        context = language_model.context_length
        if context is not None and max_tokens > context:
            raise ConfigError(
                f"max_tokens is {max_tokens}, but the model's context is {context}; give a smaller max_tokens."
            )
        return cls(language_model, [language_model.layers[number] for number in numbers], max_tokens)

    @property
    def d_ff(self) -> int:
        """Neurons of a layer."""
        return self.layers[0].d_ff

    @property
    def n_layers(self) -> int:
        """Layers that are looked at; of a mixture, experts."""
        return len(self.layers)

    def ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Tokenise texts."""
        texts = [row.text for row in rows]
        found = self.language_model.tokenizer(texts, truncation=True, max_length=self.max_tokens, verbose=False)
        return [list(each) for each in found["input_ids"]]

    def activations(self, ids: Sequence[Sequence[int]], sink: Sink) -> None:
        """Run the model over texts once, and hand on what every layer's output projection reads."""
        if not ids:
            return
        place_of = {layer.number: place for place, layer in enumerate(self.layers)}
        model = self.language_model.model
        current: list[Batch] = []

        def take(number: int, z: torch.Tensor) -> None:
            if not bool(torch.isfinite(z).all()):
                raise ModelError(
                    f"{self.language_model.layers[number].title} of {self.language_model.name} gives what is no number, expected "
                    "finite activations; its weights are damaged or too narrow – fetch the model again, or load it in float32."
                )
            sink(place_of[number], z, current[-1])

        with recorded_activations(self.layers, take) as tap:
            for batch in self._batches(ids, _TOKENS_AT_ONCE):
                current[:] = [batch]
                mask = batch.attention_mask.to(model.device)
                tap.set_mask(mask)
                with torch.inference_mode():
                    model.base_model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, use_cache=False)
                give_back_memory()

    def scored(self, ids: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Draw batches that are small enough for `losses`."""
        yield from self._batches(ids, _SCORED_AT_ONCE)

    def losses(self, batch: Batch, edit: Edit | None = None) -> np.ndarray:
        """Return the negative log likelihood of each text's tokens behind its first, in nats, float64 [n_rows].

        Args:
            batch: of `scored`.
            edit: changes what the output projections read; None: nothing does.
        """
        model = self.language_model.model
        input_ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
        editing = edited_activations(self.layers, self._by_place(edit, batch)) if edit is not None else nullcontext()
        with editing, torch.inference_mode():
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
        )
        found: np.ndarray = (loss.view(len(input_ids), -1) * mask[:, 1:]).double().sum(1).cpu().numpy()
        return found

    def _by_place(self, edit: Edit, batch: Batch) -> Callable[[MLPLayer, torch.Tensor], torch.Tensor]:
        place_of = {layer.number: place for place, layer in enumerate(self.layers)}
        n_rows, n_positions = batch.input_ids.shape
        every = torch.arange(n_rows * n_positions, device=self.language_model.model.device)

        def edited(layer: MLPLayer, z: torch.Tensor) -> torch.Tensor:
            positions = every if layer.routing is None else every[layer.routing.tokens]
            return edit(place_of[layer.number], z.reshape(-1, z.shape[-1]), positions).view_as(z)

        return edited

    def _batches(self, ids: Sequence[Sequence[int]], tokens_at_once: int) -> Iterator[Batch]:
        pad = self.language_model.tokenizer.pad_token_id or 0
        yield from batches(ids, pad, self.max_tokens, tokens_at_once)
