"""Reading the activation site while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.models.mlps import MLPLayer

Sink = Callable[[int, torch.Tensor], None]
"""Takes a layer's number and its activations [n_tokens, d_ff], padding excluded; an expert's are zero at tokens of others."""


class ActivationTap:
    """What is read in the next forward pass; ``mask`` is set before each one."""

    def __init__(self, sink: Sink) -> None:
        """Send what is read to ``sink``."""
        self._sink = sink
        self._kept: torch.Tensor | None = None
        self._n_positions = 0
        self._open = False
        self.seen: set[int] = set()

    def set_mask(self, attention_mask: torch.Tensor) -> None:
        """Say which positions are tokens (1) and which padding (0): [n_rows, n_positions]."""
        flat = attention_mask.reshape(-1).bool()
        self._n_positions = len(flat)
        self._kept = None if bool(flat.all()) else flat.nonzero().squeeze(1)
        self._open = True
        self.seen.clear()

    def pause(self) -> None:
        """Read nothing until the next mask is set."""
        self._open = False

    def read(self, layer: MLPLayer, z: torch.Tensor) -> None:
        """Pass one layer's activations on, flattened to tokens and without padding."""
        if not self._open:
            return
        number = layer.number
        z = z.detach().reshape(-1, z.shape[-1])  # some MLPs see [n_tokens, d_ff] already, the others a batch
        if layer.routing is not None:
            z = layer.routing.spread(z)
        if len(z) != self._n_positions or number in self.seen:
            raise ModelError(
                f"{layer.title} ran {'again' if number in self.seen else f'on {len(z)} positions'} in a pass over "
                f"{self._n_positions}, expected once on each; name a model that runs each layer once for a token."
            )
        self.seen.add(number)
        self._sink(number, z if self._kept is None else z.index_select(0, self._kept.to(z.device)))


@contextmanager
def recorded_activations(layers: Sequence[MLPLayer], sink: Sink) -> Iterator[ActivationTap]:
    """Send the activation site of ``layers`` to ``sink`` in every forward pass inside the block.

    Raises:
        ModelError: at the end, if a layer was never reached – the model does not run where its adapter says. Of a layer's
            experts, a pass may reach some.
    """
    tap = ActivationTap(sink)
    hooks = [
        layer.output.register_forward_pre_hook(lambda _module, inputs, layer=layer: tap.read(layer, inputs[0]))
        for layer in layers
    ]
    hooks += _routing_hooks(layers)
    try:
        yield tap
    finally:
        for hook in hooks:
            hook.remove()
    reached = {layer.block for layer in layers if layer.routing is not None and layer.number in tap.seen}
    missed = [
        layer.number
        for layer in layers
        if layer.number not in tap.seen and not (layer.routing is not None and layer.block in reached)
    ]
    if missed:
        raise ModelError(
            f"layers {missed} were never reached in a forward pass, expected all of {len(layers)}; these MLPs "
            "are not the ones that the model runs."
        )


@contextmanager
def edited_activations(
    layers: Sequence[MLPLayer], edit: Callable[[MLPLayer, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let every output projection of ``layers`` read ``edit(layer, z)`` in place of z inside the block."""
    hooks = [
        layer.output.register_forward_pre_hook(lambda _module, inputs, layer=layer: edit(layer, inputs[0]))
        for layer in layers
    ]
    hooks += _routing_hooks(layers)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _routing_hooks(layers: Sequence[MLPLayer]) -> list[Any]:
    """Let experts note which tokens they get."""
    return [
        layer.projection(layer.inputs[0]).register_forward_pre_hook(
            lambda _module, inputs, routing=layer.routing: routing.read(inputs[0])
        )
        for layer in layers
        if layer.routing is not None
    ]
