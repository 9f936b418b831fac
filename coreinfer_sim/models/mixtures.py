"""Where a mixture's experts are, and whether each can be computed as an MLP of its own.

A narrow stand-in of each kind of experts is run on random rows, by its own code and expert by expert; see `structure.verify`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import unwrap
from typing import Any

import torch
from torch import nn

from coreinfer_sim.models.experts import Expert, FoundRouting, Mixture, Noted, Routing, Stacked
from coreinfer_sim.models.structure import (
    ROWS,
    TOLERANCE,
    WIDTH,
    Arrangement,
    Mismatch,
    first_line,
    linear_module,
    parts_of,
    relative_difference,
)

_ONE_OF_SEVERAL = re.compile(r"^((.*\.\d+\..*)\.\w+)\.\d+$")
"""Path of a member of a list within a numbered layer."""
_N_CHOSEN = re.compile(
    r"^(num_experts_per_tok(en)?|n_experts_per_tok|moe_(topk|top_k|k)|top_k_experts|experts_per_token)$"
)
"""What configurations call the number of experts that a token takes."""


def is_mixture(model: Any) -> bool:
    """Return whether a model whose MLPs have been found holds experts."""
    return any(isinstance(vars(module).get("forward"), Mixture | Noted) for module in model.modules())


def stacked_experts(modules: Mapping[str, nn.Module], d_model: int) -> dict[str, Stacked]:
    """Return the layouts of modules that hold experts together, by path."""
    found = {path: Stacked.of(module, d_model) for path, module in modules.items()}
    return {path: layout for path, layout in found.items() if layout is not None}


def experts_of(module: nn.Module, layout: Stacked) -> Iterator[tuple[Expert, Arrangement]]:
    """Yield the experts that a module holds together, each as the owner of an MLP."""
    arrangement = Arrangement(tuple(layout.rows()), "down_proj", fused=False)
    for expert in Mixture.within(module, layout).experts:
        yield expert, arrangement


def lists_of_experts(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return, of owners that are members of one list with others, the path of the module that holds the list.

    Args:
        paths: of owners of MLPs.
        modules: of the model, by path.
    """
    found = {path: match for path in paths if (match := _ONE_OF_SEVERAL.match(path))}
    lists = [match[1] for match in found.values() if isinstance(modules[match[1]], nn.ModuleList)]
    return {path: match[2] for path, match in found.items() if lists.count(match[1]) > 1}


def found_routing(block: nn.Module) -> Routing:
    """Return what finds the tokens of an expert that is a module of its own within ``block``."""
    return FoundRouting(Noted.within(block))


def n_chosen(text: Any) -> int | None:
    """Return how many experts a token takes, or None where a configuration does not say it."""
    names = [*vars(text), *getattr(text, "attribute_map", {})]
    values = [getattr(text, name, None) for name in names if _N_CHOSEN.match(name)]
    return next((max(value) if isinstance(value, list) else value for value in values if value), None)


def kind_of_experts(module: nn.Module, layout: Stacked) -> Any:
    """Return what is equal for modules that compute the same, whatever their weights are."""
    return layout, parts_of(module)


def verify_experts(module: nn.Module, layout: Stacked, d_model: int) -> Mismatch | None:
    """Compare what a module gives with what its experts give one by one, and experts cut in half with masked ones.

    Args:
        module: holds the experts.
        layout: of their weights.
        d_model: width of the residual stream.
    """
    generator = torch.Generator().manual_seed(0)
    n = layout.n_experts
    x = torch.randn(ROWS, d_model, generator=generator)
    chosen = torch.stack([torch.randperm(n, generator=generator)[:2] for _ in range(ROWS)])
    given = x, chosen, torch.rand(chosen.shape, generator=generator)
    with torch.no_grad():
        stand_in, narrow = _stand_in(module, layout, d_model, generator), replace(layout, d_ff=WIDTH)
        try:
            expected = unwrap(type(module).forward)(stand_in, *given)
            difference = relative_difference(_one_by_one(Mixture(stand_in, narrow), given), expected)
        except Exception as error:  # whatever a module's code raises that wants something else
            return Mismatch(f"it cannot be called on rows, numbers of experts and weights alone ({first_line(error)})")
        if difference > TOLERANCE:
            return Mismatch(
                f"its experts differ by {difference:.2g} from what it gives when they are computed one by one"
            )
        kept = torch.arange(0, WIDTH, 2)
        halved, masked = Mixture(stand_in, narrow), Mixture(stand_in, narrow)
        for one, other in zip(halved.experts, masked.experts, strict=True):
            _cut(one, kept)
            other.down_proj.register_forward_pre_hook(
                lambda _module, z: z[0] * torch.zeros(WIDTH).index_fill(0, kept, 1.0)
            )
        try:
            difference = relative_difference(_one_by_one(halved, given), _one_by_one(masked, given))
        except Exception as error:
            return Mismatch(f"its experts cannot be called with fewer neurons ({first_line(error)})")
    if difference > TOLERANCE:
        return Mismatch(
            f"without half of their neurons its experts differ by {difference:.2g} from ones where those are zero"
        )
    return None


def _one_by_one(mixture: Mixture, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return mixture.one_by_one(*given, given[1].unique().tolist())


def _cut(expert: Expert, kept: torch.Tensor) -> None:
    parts: list[tuple[str, Any]] = list(expert.named_children())
    for name, module in parts:
        weight, bias = module.weight, module.bias
        if name == "down_proj":
            setattr(expert, name, linear_module(weight[:, kept], bias))
        else:
            setattr(expert, name, linear_module(weight[kept], None if bias is None else bias[kept]))


def _stand_in(module: nn.Module, layout: Stacked, d_model: int, generator: torch.Generator) -> nn.Module:
    """Return a copy of a module whose experts have a few neurons with random weights; it shares all other parts."""
    stand_in = copy.copy(module)
    vars(stand_in).pop("forward", None)
    stand_in._parameters = dict(module._parameters)
    n_in = WIDTH * (2 if layout.gated else 1)
    for name, shape in ((layout.inputs, (n_in, d_model)), ("down_proj", (d_model, WIDTH))):
        rows, columns = reversed(shape) if layout.turned else shape
        # each expert's weights begin one number behind those of the one before: all differ, and take the memory of one
        numbers = torch.randn(layout.n_experts + rows * columns, generator=generator) * shape[1] ** -0.5
        weight = numbers.as_strided((layout.n_experts, rows, columns), (1, columns, 1))
        stand_in._parameters[name] = nn.Parameter(weight, requires_grad=False)
        if getattr(module, f"{name}_bias", None) is not None:
            bias = torch.randn(layout.n_experts, shape[0], generator=generator)
            stand_in._parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
    return stand_in
