"""Dense MLPs of a model on a device that they do not fit into: they wait in host memory and pass through the device.

Two buffers on the device hold a layer each. While one layer computes, the next one's weights are copied into the other
buffer: on a GPU from pinned memory and in a stream of their own, so that copying and computing overlap; elsewhere at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Staging:
    """The buffers of one model."""

    def __init__(self, weights: Sequence[Sequence[torch.Tensor]], device: torch.device) -> None:
        """Bring weights; the buffers are made when the first are needed, as sparse prefill never does.

        Args:
            weights: of each layer's projections, in host memory and of one type.
            device: where they are needed.
        """
        self._weights, self._n_layers = weights, len(weights)
        self.device = device
        """Where the weights are needed."""
        self._buffers: list[torch.Tensor] = []
        self._held: list[int | None] = [None, None]
        self._current: int | None = None
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: list[Any] = [None, None]

    @property
    def held(self) -> list[int]:
        """Layers whose weights are on the device, or on their way."""
        return [number for number in self._held if number is not None]

    @property
    def n_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    def weights_of(self, number: int) -> list[torch.Tensor]:
        """Return a layer's weights on the device; they last until the layer after the next one is needed."""
        if not self._buffers:
            largest = max(sum(part.numel() for part in layer) for layer in self._weights)
            first = self._weights[0][0]
            self._buffers = [torch.empty(largest, dtype=first.dtype, device=self.device) for _ in range(2)]
        place = number % 2
        if self._current != number:
            if self._held[place] != number:
                self._copy(number)
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._copied[place])
            self._current = number
            following = (number + 1) % self._n_layers
            if following % 2 != place and self._held[1 - place] != following:
                self._copy(following)
        return self._views(number)

    def _copy(self, number: int) -> None:
        """Copy a layer into its buffer; on a GPU this only begins, once everything so far is computed."""
        views = self._views(number)
        self._held[number % 2] = number
        if self._stream is None:
            for view, weight in zip(views, self._weights[number], strict=True):
                view.copy_(weight)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for view, weight in zip(views, self._weights[number], strict=True):
                view.copy_(weight, non_blocking=True)
            self._copied[number % 2] = self._stream.record_event()

    def _views(self, number: int) -> list[torch.Tensor]:
        sizes = [weight.numel() for weight in self._weights[number]]
        parts = self._buffers[number % 2][: sum(sizes)].split(sizes)
        return [part.view(weight.shape) for part, weight in zip(parts, self._weights[number], strict=True)]


class HostLinear(nn.Module):
    """One projection whose weight waits in host memory."""

    def __init__(
        self, staging: Staging, layer: int, place: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Stand for a linear map.

        Args:
            staging: brings the weight.
            layer: number of the layer.
            place: of the projection within the layer.
            weight: in host memory, [out features, in features].
            bias: so, [out features].
        """
        super().__init__()
        self.staging, self._layer, self._place = staging, layer, place
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._device_bias = None if bias is None else bias.to(staging.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.staging.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in features] to [..., out features]."""
        return F.linear(x, self.staging.weights_of(self._layer)[self._place], self._device_bias)


def in_host_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a contiguous tensor in host memory, pinned where the device copies from pinned memory without waiting."""
    tensor = tensor.detach().contiguous()
    return tensor.pin_memory() if device.type == "cuda" else tensor
