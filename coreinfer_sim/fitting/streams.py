"""Two streams of hidden states that go through the model side by side, layer by layer.

In the dense one every layer is whole. In the sparse one every layer that is done already is compact, at the positions that
decode would reach; a prompt's positions are dense in both, as in `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer

_TOKENS_AT_ONCE = 4096
_LENGTH_STEP = 32


class Batch:
    """Some texts of similar length: both streams, and what each layer is called with beside them."""

    def __init__(
        self, dense: torch.Tensor, decoded: torch.Tensor, weights: torch.Tensor, calls: list[LayerCall]
    ) -> None:
        """Begin with what the first layer reads.

        Args:
            dense: [n_texts, n_positions, d_model].
            decoded: which positions decode would reach, bool [n_texts, n_positions].
            weights: of the tokens in a fit, 0 for padding, [n_texts, n_positions].
            calls: by layer.
        """
        self.dense = self.sparse = dense
        self.dense_out: torch.Tensor | None = None
        """The dense stream after the layer at work, once it is known."""
        self.decoded = decoded
        self.weights = weights.reshape(-1)
        self.counted = self.weights.nonzero().squeeze(1)
        """Places of the tokens that count among all positions."""
        self.calls = calls


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer over hidden states [n_texts, n_positions, d_model]."""
        if "hidden_states" in self.kwargs:
            out = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            out = block(hidden, *self.args, **self.kwargs)
        after: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return after


def decoder_blocks(language_model: LanguageModel) -> list[nn.Module]:
    """Return the model's decoder layers in order: the list of modules that holds one MLP in each of its members."""
    owners = [layer.owner for layer in language_model.layers]
    return next(
        list(modules)
        for modules in language_model.model.modules()
        if isinstance(modules, nn.ModuleList)
        and len(modules) == len(owners)
        and all(any(part is owner for part in block.modules()) for block, owner in zip(modules, owners, strict=True))
    )


def advance(layer: MLPLayer, block: nn.Module, batches: Sequence[Batch]) -> None:
    """Move both streams past a layer, the sparse one as the layer is now."""
    for batch in batches:
        call = batch.calls[layer.number]
        out = call(block, batch.sparse)
        if batch.dense_out is None:  # nothing was fitted here, so the layer is still dense
            batch.dense_out = call(block, batch.dense)
        batch.sparse = torch.where(batch.decoded[..., None], out, batch.dense_out)
        batch.dense, batch.dense_out = batch.dense_out, None


class Recording:
    """The latest activations and output of an MLP, each by token."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.z = self.y = torch.zeros(0)
        """[n_tokens, n_neurons] and [n_tokens, d_model]."""


@contextmanager
def recorded(layer: MLPLayer) -> Iterator[Recording]:
    """Read a layer's MLP in every pass of the block."""
    recording = Recording()

    def read(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        recording.z = inputs[0].reshape(-1, inputs[0].shape[-1])
        recording.y = output.reshape(-1, output.shape[-1]).clone()  # Falcon adds to it in place

    hook = layer.output.register_forward_hook(read)
    try:
        yield recording
    finally:
        hook.remove()


def make_batches(
    language_model: LanguageModel, blocks: Sequence[nn.Module], texts: Sequence[CalibrationText], prompt_weight: float
) -> Iterator[Batch]:
    """Pad texts of similar length to few shapes and embed them.

    Args:
        language_model: the dense model.
        blocks: its decoder layers.
        texts: in any order.
        prompt_weight: weight of a prompt's token beside one of the completion.
    """
    calls: dict[torch.Size, list[LayerCall]] = {}
    device = language_model.model.device
    ordered = sorted(texts, key=lambda text: -len(text.ids))
    begin = 0
    while begin < len(ordered):
        n_positions = -(-len(ordered[begin].ids) // _LENGTH_STEP) * _LENGTH_STEP
        group = ordered[begin : begin + max(1, _TOKENS_AT_ONCE // n_positions)]
        begin += len(group)
        # Padding lies to the right, where causal attention never looks, so that no mask is needed.
        input_ids = torch.zeros(len(group), n_positions, dtype=torch.int64)
        weights = torch.zeros(len(group), n_positions)
        for row, text in enumerate(group):
            input_ids[row, : len(text.ids)] = torch.tensor(text.ids)
            weights[row, : len(text.ids)] = 1.0
            weights[row, : text.n_prompt] = prompt_weight
        n_prompt = torch.tensor([text.n_prompt for text in group])
        decoded = torch.arange(n_positions) >= n_prompt[:, None]
        shape = input_ids.shape
        hidden, found = _enter(language_model, blocks, input_ids.to(device), all_blocks=shape not in calls)
        if shape not in calls:
            calls[shape] = found
        yield Batch(hidden, decoded.to(device), weights.to(device), calls[shape])


class _Entered(Exception):
    """The first decoder layer has been reached; no other is wanted."""


def _enter(
    language_model: LanguageModel, blocks: Sequence[nn.Module], input_ids: torch.Tensor, all_blocks: bool
) -> tuple[torch.Tensor, list[LayerCall]]:
    """Return what the first decoder layer reads, and what each layer is called with beside it.

    Arguments do not depend on the hidden states, so the layers after the first hand on what they are given, uncomputed.
    """
    hidden: list[torch.Tensor] = []
    calls: list[LayerCall] = []
    outputs: list[Any] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        calls.append(LayerCall(args[1:], kwargs))
        if not all_blocks:
            raise _Entered

    def hand_on(*_args: Any, **_kwargs: Any) -> Any:
        return (hidden[-1], *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden[-1]

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    hooks.append(blocks[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output)))
    forwards = [vars(block).get("forward") for block in blocks]  # accelerate, for one, puts its own there
    for block in blocks[1:]:
        block.forward = hand_on
    try:
        language_model.model.base_model(input_ids=input_ids, use_cache=False)
    except _Entered:
        pass
    finally:
        for block, forward in zip(blocks[1:], forwards[1:], strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
        for hook in hooks:
            hook.remove()
    return hidden[0], calls
