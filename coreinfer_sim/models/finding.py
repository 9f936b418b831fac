"""Looks for the MLPs of a model's numbered layers, and verifies one of each kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from coreinfer_sim.base.errors import UnsupportedModelError
from coreinfer_sim.models.experts import Routing
from coreinfer_sim.models.mixtures import (
    experts_of,
    found_routing,
    kind_of_experts,
    lists_of_experts,
    stacked_experts,
    verify_experts,
)
from coreinfer_sim.models.structure import (
    LINEARS,
    Arrangement,
    Mismatch,
    arrangements,
    kind_of,
    verify,
    weight_shape,
)

_PLACE = re.compile(r"^(.*?\.\d+)(\.|$)")
"""Of a module within a numbered layer."""


@dataclass(frozen=True)
class Found:
    """An MLP that was found."""

    path: str
    owner: Any
    arrangement: Arrangement
    routing: Routing | None = None

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return weight_shape(self.owner.get_submodule(self.arrangement.output))[1]


def found_mlps(name: str, modules: Mapping[str, nn.Module], d_model: int) -> list[Found]:
    """Return all MLPs of the widest kind that numbered layers hold; of a mixture, the experts and what is as wide as they."""
    candidates = _candidates(modules, d_model)
    stacked = stacked_experts({path: each for path, each in modules.items() if _PLACE.match(path)}, d_model)
    listed = lists_of_experts([each.path for each in candidates], modules)
    order = {path: number for number, path in enumerate(modules)}
    of_experts: dict[Any, Mismatch | None] = {}
    kinds: dict[Any, Arrangement | Mismatch] = {}
    found: list[tuple[int, Found]] = []
    # 1) experts whose weights lie together
    for path, layout in stacked.items():
        module = modules[path]
        kind = kind_of_experts(module, layout)
        if kind not in of_experts:
            of_experts[kind] = verify_experts(module, layout, d_model)
        mismatch = of_experts[kind]
        if mismatch is not None:
            raise _refusal(name, path, module, mismatch)
        for number, (expert, arrangement) in enumerate(experts_of(module, layout)):
            found.append((order[path], Found(f"{path}.{number}", expert, arrangement, expert.routing)))
    # 2) other owners: of a mixture those as wide as its experts, else of the widest kind
    experts = [each for _, each in found] + [each for each in candidates if each.path in listed]
    widest = max(candidates, key=lambda each: each.d_ff, default=None)
    for each in sorted(candidates, key=lambda each: order[each.path]):
        owner, arrangement = each.owner, each.arrangement
        is_kind = widest and (type(owner), arrangement) == (type(widest.owner), widest.arrangement)
        if not (each.d_ff == experts[0].d_ff if experts else is_kind):
            continue
        _check_kinds(each.path, owner, arrangement)
        kind = kind_of(owner, arrangement)
        if kind not in kinds:
            kinds[kind] = verify(owner, arrangement)
        verified = kinds[kind]
        if isinstance(verified, Mismatch):
            if experts and each.path not in listed:
                continue  # a part of another purpose, of which the experts' width is all that is known
            raise _refusal(name, each.path, owner, verified)
        routing = found_routing(modules[listed[each.path]]) if each.path in listed else None
        found.append((order[each.path], replace(each, arrangement=verified, routing=routing)))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def _candidates(modules: Mapping[str, nn.Module], d_model: int) -> list[Found]:
    """Return what may be an MLP in numbered layers: of several owners of the same projections the innermost."""
    candidates: list[Found] = []
    taken: set[frozenset[int]] = set()
    for path, module in sorted(modules.items(), key=lambda each: -each[0].count(".")):
        for each in arrangements(module, d_model) if _PLACE.match(path) else ():
            projections = frozenset(id(module.get_submodule(part)) for part in (*each.inputs, each.output))
            if projections not in taken:
                candidates.append(Found(path, module, each))
                taken.add(projections)
    return candidates


def _refusal(name: str, path: str, owner: Any, mismatch: Mismatch) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} of {name}, a {type(owner).__name__}, is no MLP whose neurons can be left out: {mismatch.reason}; name another "
        "model."
    )


def _check_kinds(path: str, owner: Any, arrangement: Arrangement) -> None:
    for name in (*arrangement.inputs, arrangement.output):
        kind = type(owner.get_submodule(name))
        if kind not in LINEARS:
            raise UnsupportedModelError(
                f"{name} of {path} is a {kind.__module__}.{kind.__name__}, expected a plain linear layer; merge adapters, and "
                "load the model without quantisation."
            )


def place_of(path: str) -> str:
    """Return the path of the numbered layer that a module lies in."""
    found = _PLACE.match(path)
    assert found is not None  # as only such modules are candidates
    return found[1]
