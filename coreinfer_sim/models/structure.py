"""What a module's MLP is made of, read from the module itself and verified by running it.

Two or three linear layers whose widths fit are a candidate. A narrow stand-in of the module, with random projections, is run
on random rows, and its neurons are compared with ``activation(gate(x)) * up(x)`` or ``activation(input(x))``. No weight of the
model is read, so that this is the same, and as cheap, for models whose weights are on disk, on a GPU, or not there at all.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import isfunction, signature
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.models.experts import ExpertLinear
from coreinfer_sim.models.offload import HostLinear
from coreinfer_sim.models.streaming import StreamedLinear

LINEARS = (nn.Linear, Conv1D, FalconLinear, StreamedLinear, HostLinear, ExpertLinear)
"""Kinds of linear layers that can be cut; a subclass may hold more than its weight."""
WIDTH = 24
"""Neurons of a stand-in, of which every other one is kept in a second, narrower one."""
ROWS = 3
_ROUNDING = 1e-6
"""Of the largest value: two ways of computing the same in float32."""
TOLERANCE = 1e-4
"""Of the largest value; float32 rounds sums of some thousand products to about 1e-6 of it."""
_OTHER_KINDS = re.compile(r"(Attention|Att|Attn|Mixer|RecurrentBlock|DeltaNet|Conv)\w*$")
"""Class names of modules that hold linear layers of fitting widths, but mix positions; nothing else tells them by their parts."""
_NUMBERS = re.compile(r"layer_?(idx|id|index|number)|^training$")

Activation = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Arrangement:
    """Which linear layers of a module may be the projections of an MLP."""

    inputs: tuple[str, ...]
    """Paths of the projections from d_model to d_ff: one if plain or fused, gate before up if gated."""
    output: str
    """Path of the projection from d_ff to d_model."""
    fused: bool
    """The one input projection holds gate and up, one after the other."""
    norm: bool = False
    """The owner itself norms what the output projection gives, alone or added to the residual stream."""


@dataclass(frozen=True)
class Mismatch:
    """Why a module is no MLP that can be cut."""

    reason: str


def weight_shape(projection: Any) -> tuple[int, int]:
    """Return (out features, in features) of a linear projection; Conv1D stores the transpose."""
    rows, columns = projection.weight.shape
    return (columns, rows) if isinstance(projection, Conv1D) else (rows, columns)


def arrangements(owner: nn.Module, d_model: int) -> Iterator[Arrangement]:
    """Yield what the projections of a module's MLP may be, by their widths alone.

    Args:
        owner: holds them itself, or in modules of its own.
        d_model: width of the residual stream.
    """
    for depth in (1, 2):
        if _OTHER_KINDS.search(type(owner).__name__):
            return
        linears = dict(_linears(owner, depth))
        if depth == 2 and not any("." in path for path in linears):
            return
        shapes = {path: weight_shape(module) for path, module in linears.items()}
        reading = {path: n_out for path, (n_out, n_in) in shapes.items() if n_in == d_model}
        for output, (n_out, d_ff) in shapes.items():
            if n_out != d_model:
                continue
            plain = tuple(path for path, width in reading.items() if width == d_ff and path != output)
            double = tuple(path for path, width in reading.items() if width == 2 * d_ff)
            inputs = double if not plain else plain if not double else ()
            if len(inputs) == 1 or inputs == plain and len(plain) == 2:
                yield Arrangement(inputs, output, fused=bool(double))


def _linears(owner: nn.Module, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers of a module down to a depth, without those of modules that attend or scan."""
    for name, module in owner.named_children():
        if isinstance(module, LINEARS) and module.weight.dim() == 2:
            yield name, module
        elif depth > 1 and not _OTHER_KINDS.search(type(module).__name__):
            yield from ((f"{name}.{path}", each) for path, each in _linears(module, depth - 1))


def kind_of(owner: nn.Module, arrangement: Arrangement) -> Any:
    """Return what is equal for layers that compute the same, whatever their weights are."""
    paths = (*arrangement.inputs, arrangement.output)
    biases = tuple(owner.get_submodule(path).bias is None for path in paths)
    return arrangement, weight_shape(owner.get_submodule(arrangement.output)), biases, parts_of(owner)


def parts_of(owner: nn.Module) -> Any:
    """Return the classes of a module's parts, and the numbers and names that decide what they compute."""
    return tuple(
        (type(module), tuple(sorted((name, value) for name, value in vars(module).items() if _decides(name, value))))
        for module in owner.modules()
    )


def _decides(name: str, value: Any) -> bool:
    return isinstance(value, int | float | str) and not _NUMBERS.search(name)


def verify(owner: nn.Module, arrangement: Arrangement) -> Arrangement | Mismatch:
    """Run a narrow stand-in of a module on random rows, and compare it with the formula of an MLP.

    Two things are verified in float32: that the neurons are what the formula says, and that a module that holds some of them
    returns what the whole one does without the others.

    Returns:
        The arrangement, with the gate before up.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        d_model, _ = weight_shape(owner.get_submodule(arrangement.output))
        x = torch.randn(1, ROWS, d_model, generator=generator)
        projections = _narrow(owner, arrangement, generator)
        try:
            stand_in = _stand_in(owner, projections)
            with _norms(stand_in) as norms:
                seen, out = _run(stand_in, projections, x)
        except Exception as error:  # whatever a module's code raises that wants more than hidden states
            return Mismatch(f"it cannot be called on hidden states alone ({first_line(error)})")
        found = _ordered(stand_in, arrangement, seen)
        if isinstance(found, Mismatch):
            return found
        kept = torch.arange(0, WIDTH, 2)
        outputs = []
        for own in (_cut(projections, found, kept), _masked(projections, found, kept)):
            try:
                outputs.append(_run(_stand_in(owner, own), own, x)[1])
            except Exception as error:
                return Mismatch(f"it cannot be called with fewer neurons ({first_line(error)})")
        difference = relative_difference(*outputs)
        if difference > TOLERANCE:
            return Mismatch(f"without half of its neurons it differs by {difference:.2g} from one where those are zero")
        y = seen[found.output][0][1]
        return replace(found, norm=any(torch.equal(read, y) or torch.equal(given, out) for read, given in norms))


@contextmanager
def _norms(stand_in: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Note within the block what the norms of a module read and give."""
    noted: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _module, given, out: noted.append((given[0], out)))
        for module in stand_in.modules()
        if "Norm" in type(module).__name__ and not any(True for _ in module.children())
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


_Seen = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
"""What each projection read and gave, in the order of its calls."""


def _run(stand_in: nn.Module, projections: Mapping[str, nn.Linear], x: torch.Tensor) -> tuple[_Seen, torch.Tensor]:
    seen: _Seen = {path: [] for path in projections}
    hooks = [
        module.register_forward_hook(lambda _module, given, y, path=path: seen[path].append((given[0], y)))
        for path, module in projections.items()
    ]
    try:
        out = stand_in(x, *(x for _ in range(n_required(stand_in) - 1)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen, (out[0] if isinstance(out, tuple | list) else out)


def n_required(module: nn.Module) -> int:
    """Return with how many arguments a module must be called."""
    given = signature(module.forward).parameters.values()
    return sum(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in given)


def _ordered(stand_in: nn.Module, arrangement: Arrangement, seen: _Seen) -> Arrangement | Mismatch:
    """Return an arrangement with the gate before up, if the neurons are what the formula says."""
    calls = {path: len(each) for path, each in seen.items()}
    if set(calls.values()) != {1}:
        return Mismatch(f"its projections are called {calls} times, expected once each")
    if not all(torch.equal(seen[path][0][0], seen[arrangement.inputs[0]][0][0]) for path in arrangement.inputs):
        return Mismatch(f"{' and '.join(arrangement.inputs)} read different inputs, expected the same")
    z = seen[arrangement.output][0][0]
    parts = [seen[path][0][1] for path in arrangement.inputs]
    if arrangement.fused:
        parts = list(parts[0].chunk(2, -1))
    best, name = float("inf"), "none"
    order: tuple[int, ...] = (0,)
    for activation in _activations(stand_in, z.shape):
        for places in itertools.permutations(range(len(parts))):
            neurons = activation(parts[places[0]])
            difference = relative_difference(neurons * parts[places[1]] if len(places) == 2 else neurons, z)
            if difference < best:
                best, order, name = difference, places, getattr(activation, "__name__", type(activation).__name__)
        if best < _ROUNDING:
            break
    if best > TOLERANCE:
        formula = "activation(gate(x)) * up(x)" if len(parts) == 2 else "activation(input(x))"
        return Mismatch(f"its neurons differ by {best:.2g} from {formula} with the nearest activation, {name}")
    if arrangement.fused and order == (1, 0):
        return Mismatch(f"{arrangement.inputs[0]} holds up before gate, expected gate before up")
    if arrangement.fused or len(order) == 1:
        return arrangement
    return replace(arrangement, inputs=tuple(arrangement.inputs[place] for place in order))


def _activations(stand_in: nn.Module, shape: torch.Size) -> Iterator[Activation]:
    """Yield what may be a module's activation: its own functions first, then all that transformers knows.

    Falcon-H1 multiplies what its activation reads by a number that the module holds.
    """
    own: list[Any] = [module for module in stand_in.modules() if not any(True for _ in module.children())]
    own += [value for module in stand_in.modules() for value in vars(module).values() if isfunction(value)]
    own = [each for each in own if _keeps_shape(each, shape)]
    yield from own
    factors = [value for value in vars(stand_in).values() if isinstance(value, float) and value not in (0.0, 1.0)]
    for each, factor in itertools.product(own, factors):
        yield partial(_scaled, each, factor)
    yield from _known_activations()


def _scaled(activation: Activation, factor: float, z: torch.Tensor) -> Any:
    return activation(z * factor)


def _keeps_shape(function: Any, shape: torch.Size) -> bool:
    try:
        return bool(function(torch.ones(shape)).shape == shape)
    except Exception:  # no function of one tensor
        return False


@lru_cache(maxsize=1)
def _known_activations() -> list[Activation]:
    return [ACT2FN[name] for name in ACT2FN if name != "xielu"]  # it has parameters, so that a module holds its own


def _narrow(owner: nn.Module, arrangement: Arrangement, generator: torch.Generator) -> dict[str, nn.Linear]:
    """Return random projections of a few neurons in place of a module's own."""
    narrow = {}
    for path in (*arrangement.inputs, arrangement.output):
        module = owner.get_submodule(path)
        n_out, n_in = weight_shape(module)
        if path == arrangement.output:
            n_in = WIDTH
        else:
            n_out = 2 * WIDTH if arrangement.fused else WIDTH
        weight = torch.randn(n_out, n_in, generator=generator) * n_in**-0.5
        narrow[path] = linear_module(weight, None if module.bias is None else torch.randn(n_out, generator=generator))
    return narrow


def _cut(projections: Mapping[str, nn.Linear], arrangement: Arrangement, kept: torch.Tensor) -> dict[str, nn.Linear]:
    rows = torch.cat([kept, kept + WIDTH]) if arrangement.fused else kept
    cut = {
        path: linear_module(module.weight[rows], None if module.bias is None else module.bias[rows])
        for path, module in projections.items()
        if path != arrangement.output
    }
    output = projections[arrangement.output]
    return {**cut, arrangement.output: linear_module(output.weight[:, kept], output.bias)}


def _masked(projections: Mapping[str, nn.Linear], arrangement: Arrangement, kept: torch.Tensor) -> dict[str, nn.Linear]:
    output = projections[arrangement.output]
    weight = torch.zeros_like(output.weight)
    weight[:, kept] = output.weight[:, kept]
    return {**projections, arrangement.output: linear_module(weight, output.bias)}


def linear_module(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a linear layer over these very tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _stand_in(owner: nn.Module, projections: Mapping[str, nn.Linear]) -> nn.Module:
    """Return a copy of a module with other projections, and with parameters that take no memory in place of its own."""
    copied: dict[int, Any] = {id(owner.get_submodule(path)): module for path, module in projections.items()}
    for module in owner.modules():
        if id(module) not in copied and isinstance(module, LINEARS):
            copied[id(module)] = _Averaging(weight_shape(module)[0])
        for name in ("config", "_forward_hooks", "_forward_pre_hooks"):
            value = vars(module).get(name)
            if value is not None:
                copied[id(value)] = value if name == "config" else type(value)()
    for tensor in itertools.chain(owner.parameters(), owner.buffers()):
        if tensor.is_floating_point():
            constant = torch.full((), 0.5).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            copied[id(tensor)] = nn.Parameter(constant, requires_grad=False) if is_parameter else constant
        elif tensor.is_meta:
            copied[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return copy.deepcopy(owner, copied).eval()


class _Averaging(nn.Module):
    """In place of a linear layer that is no projection of the MLP."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.weight = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(-1, keepdim=True).expand(*x.shape[:-1], self.n_out)


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))


def first_line(error: Exception) -> str:
    """Return what an error says first."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
