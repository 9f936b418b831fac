"""Experts of a mixture, each as an MLP of its own, whose tokens are those that the router sends to it.

transformers holds the weights of all experts of a layer in parameters with one dimension more, and multiplies them together.
`Mixture` stands in place of that forward code: while nobody reads or replaces an expert that runs, the layer's own code runs;
else its experts run one after the other. Where each expert is a module of its own, `Noted` finds out which tokens it got.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coreinfer_sim.base.errors import ModelError


class Routing:
    """Which tokens of a pass an expert computes now."""

    tokens: torch.Tensor
    """Their places in the pass, [n_rows]."""
    n_tokens: int
    """Of the whole pass."""

    def read(self, x: torch.Tensor) -> None:
        """Take note of what the expert's input projections read now; these know its tokens already."""

    def spread(self, z: torch.Tensor) -> torch.Tensor:
        """Return what the expert has of its tokens, [n_rows, n], for all tokens: zero for those of other experts."""
        spread = z.new_zeros(self.n_tokens, z.shape[-1])
        spread[self.tokens] = z
        return spread


@dataclass(frozen=True)
class Stacked:
    """How a module holds the weights of all its experts."""

    n_experts: int
    d_ff: int
    inputs: str
    """Name of the parameter of the input projections: gate and up if gated."""
    gated: bool
    interleaved: bool
    """Rows of gate and up take turns; else up follows gate."""
    turned: bool
    """Matrices are [n_in, n_out]."""

    @classmethod
    def of(cls, module: nn.Module, d_model: int) -> Stacked | None:
        """Return how a module does, or None if it holds no experts in this way."""
        parameters = dict(module.named_parameters(recurse=False))
        name = next((each for each in ("gate_up_proj", "up_proj") if each in parameters), "")
        inputs, output = parameters.get(name), parameters.get("down_proj")
        if inputs is None or output is None or not inputs.dim() == output.dim() == 3:
            return None
        if len(inputs) != len(output) or len(signature(module.forward).parameters) < 3:
            return None  # some tokens pass by all experts, or no router is asked
        turned = bool(getattr(module, "is_transposed", output.shape[1] != d_model))
        n_experts, d_ff = output.shape[0], output.shape[1 if turned else 2]
        gated = name == "gate_up_proj"
        return cls(n_experts, d_ff, name, gated, not getattr(module, "is_concatenated", True), turned)

    def rows(self) -> dict[str, slice]:
        """Return the outputs of the parameter that each input projection has."""
        if not self.gated:
            return {"up_proj": slice(None)}
        if self.interleaved:
            return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        return {"gate_proj": slice(self.d_ff), "up_proj": slice(self.d_ff, None)}


class ExpertLinear(nn.Module):
    """One projection of one expert; the weight lies in a parameter of all experts."""

    def __init__(self, experts: nn.Module, number: int, parameter: str, turned: bool, rows: slice) -> None:
        """Stand for a part of a parameter.

        Args:
            experts: holds it, and stays the only one that does.
            number: of the expert.
            parameter: name of it.
            turned: whether it is [n_in, n_out].
            rows: outputs that are meant.
        """
        super().__init__()
        self._experts = (experts,)  # no submodule: weights have one place
        self._number, self._parameter, self._turned, self._rows = number, parameter, turned, rows

    @property
    def weight(self) -> torch.Tensor:
        """[n_out, n_in], of the same memory."""
        stored: torch.Tensor = getattr(self._experts[0], self._parameter)[self._number]
        return (stored.T if self._turned else stored)[self._rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """[n_out], or None."""
        stored: torch.Tensor | None = getattr(self._experts[0], f"{self._parameter}_bias", None)
        return None if stored is None else stored[self._number][self._rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., n_in] to [..., n_out]."""
        return F.linear(x, self.weight, self.bias)


class Expert(nn.Module):
    """One of the experts that a module holds together; its projections can be replaced by narrower ones."""

    def __init__(self, experts: nn.Module, layout: Stacked, number: int) -> None:
        """Stand for the expert of a number."""
        super().__init__()
        self._experts, self._layout = (experts,), layout
        self.gate_proj: Any
        self.up_proj: Any
        self.down_proj: Any
        self.routing = Routing()
        for name, rows in layout.rows().items():
            setattr(self, name, ExpertLinear(experts, number, layout.inputs, layout.turned, rows))
        self.down_proj = ExpertLinear(experts, number, "down_proj", layout.turned, slice(None))

    @property
    def is_dense(self) -> bool:
        """Whether nobody reads or replaces its projections."""
        return all(
            type(each) is ExpertLinear and not each._forward_pre_hooks and not each._forward_hooks
            for each in self.children()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the expert's tokens [n_rows, d_model], without the router's weights."""
        experts: Any = self._experts[0]
        up = self.up_proj(x)
        if not self._layout.gated:
            z = experts.act_fn(up)
        else:
            gate = self.gate_proj(x)
            if not hasattr(experts, "_apply_gate"):
                z = experts.act_fn(gate) * up
            elif self._layout.interleaved:
                z = experts._apply_gate(torch.stack([gate, up], -1).flatten(-2))
            else:
                z = experts._apply_gate(torch.cat([gate, up], -1))
        y: torch.Tensor = self.down_proj(z)
        return y


class Mixture:
    """The forward code of a module that holds experts, in place of its own."""

    def __init__(self, module: nn.Module, layout: Stacked) -> None:
        """Run the experts of ``module``."""
        self.layout = layout
        self._own = module.forward
        self.experts = [Expert(module, layout, number) for number in range(layout.n_experts)]

    @classmethod
    def within(cls, module: nn.Module, layout: Stacked) -> Mixture:
        """Return what stands in place of a module's forward code, put there if it is not yet."""
        found = vars(module).get("forward")
        if not isinstance(found, cls):
            found = module.forward = cls(module, layout)
        return found

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Add up what the chosen experts give.

        Args:
            x: [n_tokens, d_model].
            chosen: numbers of each token's experts, [n_tokens, n_chosen].
            weights: of the router, [n_tokens, n_chosen].
        """
        hit = [number for number in chosen.unique().tolist() if number < len(self.experts)]
        if all(self.experts[number].is_dense for number in hit):
            own: torch.Tensor = self._own(x, chosen, weights)
            return own
        return self.one_by_one(x, chosen, weights, hit)

    def one_by_one(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, hit: list[int]) -> torch.Tensor:
        """Do so expert by expert; ``hit`` are those that are chosen."""
        out = torch.zeros_like(x)
        for number in hit:
            tokens, places = torch.where(chosen == number)
            expert = self.experts[number]
            expert.routing.tokens, expert.routing.n_tokens = tokens, len(x)
            y = expert(x[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out


class Noted:
    """The forward code of a module whose experts are modules of their own: notes what it reads."""

    def __init__(self, block: nn.Module) -> None:
        """Note what ``block`` reads."""
        self._own: Callable[..., Any] = block.forward
        self.x = torch.empty(0)

    @classmethod
    def within(cls, block: nn.Module) -> Noted:
        """Return what stands in place of a module's forward code, put there if it is not yet."""
        found = vars(block).get("forward")
        if not isinstance(found, cls):
            found = block.forward = cls(block)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code."""
        self.x = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        try:
            return self._own(*args, **kwargs)
        finally:
            self.x = torch.empty(0)


class FoundRouting(Routing):
    """Which rows of its layer an expert reads that is a module of its own, found by their values."""

    def __init__(self, layer: Noted) -> None:
        """Find rows among those that ``layer`` has read."""
        self._layer = layer

    def read(self, x: torch.Tensor) -> None:
        """Find rows [..., d_model]."""
        rows, among = (each.reshape(-1, each.shape[-1]) for each in (x, self._layer.x))
        found = places_of(rows, among)
        if found is None:
            raise ModelError(
                "an expert reads rows that its layer has not read, expected some of them as they are; name another model."
            )
        self.tokens, self.n_tokens = found, len(among)


def places_of(rows: torch.Tensor, among: torch.Tensor) -> torch.Tensor | None:
    """Return where rows [n, d] lie among others [m, d], [n]; of equal ones each is taken once. None: some do not."""
    keys, wanted = _keys(among), _keys(rows)
    order, own_order = keys.argsort(stable=True), wanted.argsort(stable=True)
    keys, wanted = keys[order], wanted[own_order]
    n_before = torch.arange(len(wanted), device=wanted.device) - torch.searchsorted(wanted, wanted)  # equal ones
    at = torch.searchsorted(keys, wanted) + n_before
    if len(at) and (int(at.max()) >= len(keys) or not bool((keys[at] == wanted).all())):
        return None
    places = torch.empty_like(own_order)
    places[own_order] = order[at]
    return places


def _keys(rows: torch.Tensor) -> torch.Tensor:
    """Return whole numbers [n] that are equal for rows [n, d] of equal bits, and else hardly ever."""
    integers = rows.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator)
    return (integers.long() * factors.to(rows.device)).sum(-1)
