"""What a run will hold in memory, and models loaded to keep to a budget: one that is too small is refused before loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coreinfer_sim.base.errors import BudgetError
from coreinfer_sim.base.memory import give_back_memory, peak_bytes, resident_bytes
from coreinfer_sim.base.progress import Progress, readable_size
from coreinfer_sim.base.settings import Fallback, Mode, parse_layers
from coreinfer_sim.engines.cutting import MERGED_ROWS
from coreinfer_sim.engines.registry import AUTO, engine_class
from coreinfer_sim.engines.sizes import DiskParts
from coreinfer_sim.index.ranking import n_kept
from coreinfer_sim.models import budgeted
from coreinfer_sim.models.budgeted import ModelShape
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.streaming import SCRATCH

MIB = 1 << 20
_RESERVE = 48 * MIB
"""What a run holds besides: generate's own objects, holes in the heap, the libraries' work buffers."""
_DEVICE_RESERVE = 128 * MIB
"""The same on a GPU: the libraries' work buffers, holes in the allocator's blocks."""
_MARGIN = 16 * MIB
"""By which two runs differ in what they hold before the model is loaded."""
_FOR_POSITIONS = 16
"""One part in so many of what is left is for longer texts, the others for records of neurons."""


@dataclass(frozen=True)
class Use:
    """What a run will do with a model, as far as memory depends on it."""

    n_kept: Sequence[int]
    """Neurons of each layer that decode holds at most, [n_layers]; see `most_kept`."""
    n_prompt: int
    """Tokens of the prompt."""
    n_new: int
    """Tokens to generate."""
    compensated: bool = False
    """Whether compensation is merged."""
    n_sequences: int = 1
    """Rows times beams."""
    streams: bool = True
    """Whether dense layers are read during prefill."""
    held_by: Callable[[float], int] | None = None
    """Bytes that an engine holds, from the bytes of a neuron; None: those of the neurons."""
    lookup_bytes: int = 0
    """What embedding a prompt takes and gives back before the prompt is read."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold at its peak."""

    budget: int
    parts: Mapping[str, int]
    """Bytes by what they are for."""
    peak_so_far: int
    n_positions: int
    position_bytes: int
    """What one further position takes."""

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return max(sum(self.parts.values()), self.peak_so_far)

    @property
    def smallest(self) -> int:
        """The smallest budget that surely works, in whole MiB: what is held varies a little between runs."""
        return math.ceil((self.needed + _MARGIN) / MIB) * MIB

    @property
    def position_limit(self) -> int:
        """How many positions, prompt and new tokens together, the budget has room for."""
        return self.n_positions + (self.budget - self.needed) // self.position_bytes

    def check(self) -> None:
        """Raise BudgetError if the budget is too small, with the smallest one that works."""
        if self.needed > self.budget:
            least = f"{self.smallest // MIB}MiB"
            raise BudgetError(
                f"the memory budget is {readable_size(self.budget)}, but this needs {least} ({self.text()}, and "
                f"{_MARGIN // MIB} MiB to be sure); give at least {least}, keep fewer neurons, or ask for a "
                "shorter text."
            )

    def text(self) -> str:
        """Say in one line what the memory is for."""
        return ", ".join(f"{name} {readable_size(n_bytes)}" for name, n_bytes in self.parts.items() if n_bytes)


def plan_budget(
    budget: int, shape: ModelShape, use: Use, base: int, peak_so_far: int = 0, on_device: bool = False
) -> MemoryPlan:
    """Add up what a run will hold.

    Args:
        budget: bytes that it may hold.
        shape: of the model.
        use: what will be done with it.
        base: bytes that the process holds before the model is loaded: libraries and index.
        peak_so_far: the most that it has held until now.
        on_device: the budget is of a device that dense layers pass through two at a time, and neurons are cut outside.
    """
    neuron_bytes = shape.mlp_bytes / (shape.n_layers * shape.d_ff)
    most = max(use.n_kept)
    of_neurons = math.ceil(sum(use.n_kept) * neuron_bytes) if use.held_by is None else use.held_by(neuron_bytes)
    held = of_neurons + shape.n_layers * shape.d_model * shape.itemsize
    # The change of the output weights in 16 bits, and some rows of it, of the weights and of their sum in float32.
    merging = most * (2 * shape.d_model + 12 * MERGED_ROWS) if use.compensated else 0
    n_positions = use.n_prompt + use.n_new
    reading = use.n_sequences * _reading_bytes(shape, shape.d_ff if use.streams else most, n_positions)
    cache = use.n_sequences * shape.cache_bytes
    output_bytes = shape.d_ff * shape.d_model * shape.itemsize
    passing = 2 * shape.mlp_bytes // shape.n_layers if on_device else SCRATCH + output_bytes
    read = reading * use.n_prompt + (passing if use.streams else 0)
    cut = 0 if on_device else math.ceil(most * neuron_bytes) + merging
    passing_by = {
        f"cache of {n_positions} positions": cache * n_positions,
        **({"reading the prompt": read} if read >= cut else {"cutting neurons": cut}),  # one after the other
        "logits": use.n_sequences * 12 * shape.vocabulary,
    }
    parts = {
        "libraries and index": base,
        "weights outside MLPs": shape.other_bytes,
        "held neurons": held,
        **passing_by,
        "embedding prompts": max(0, use.lookup_bytes - sum(passing_by.values())),  # before the rest of a prompt's work
        "reserve": _DEVICE_RESERVE if on_device else _RESERVE,
    }
    return MemoryPlan(budget, parts, peak_so_far, n_positions, cache + reading)


def plan_by_token(budget: int, parts: DiskParts, use: Use, n_measured: int, progress: Progress) -> tuple[int, int]:
    """Plan a run whose tokens choose neurons that lie on the disk: what else it needs comes first, records get the rest.

    Args:
        budget: bytes that this process may hold, as the operating system counts them.
        parts: of the model.
        use: what will be done with it; neurons are not cut.
        n_measured: tokens of the longest text on which it is measured beforehand what tokens need.
        progress: takes the plan.

    Returns:
        Bytes for records besides those that are read at a time, and how many positions there is room for.

    Raises:
        BudgetError: the budget is too small.
    """
    give_back_memory()
    base, shape, n_positions = resident_bytes(), parts.shape, use.n_prompt + use.n_new
    reading = use.n_sequences * _reading_bytes(shape, shape.d_ff, n_positions)
    cache = use.n_sequences * shape.cache_bytes
    passing_by = {
        f"cache of {n_positions} positions": cache * n_positions,
        "reading the prompt": reading * use.n_prompt + parts.layer + 2 * SCRATCH,
        "logits": use.n_sequences * 12 * shape.vocabulary,
    }
    needed = {
        "libraries and index": base,
        "weights outside MLPs": parts.resident,
        "estimates": parts.estimates,
        "neurons that are read at a time": parts.staged,
        **passing_by,
        "embedding prompts": max(0, use.lookup_bytes - sum(passing_by.values())),
        "reserve": _RESERVE,
    }
    # 1) before any records are held
    measuring = parts.resident + parts.estimates + _reading_bytes(shape, shape.d_ff, n_measured) * n_measured
    peak = max(peak_bytes(), base + parts.making, base + measuring + parts.layer + 2 * SCRATCH)
    plan = MemoryPlan(budget, needed, peak, n_positions, cache + reading)
    plan.check()
    # 2) while tokens are generated
    spare = max(0, budget - sum(needed.values()) - _MARGIN)
    records = min(parts.records, spare - spare // _FOR_POSITIONS)
    share = records / max(1, parts.records)
    plan = replace(plan, parts={**needed, f"{share:.0%} of all neurons": records})
    return records, _checked(plan, progress)


def _reading_bytes(shape: ModelShape, n_ff: int, n_positions: int) -> int:
    """Return what reading one position of a prompt takes, with so many neurons of each layer."""
    width = 5 * n_ff + 16 * shape.d_model
    return width * max(4, shape.itemsize) + 4 * n_positions


def most_kept(
    n_layers: int,
    d_ff: int,
    modes: Sequence[Mode],
    keep_ratio: float,
    sparse_layers: str = ":",
    fallback: Fallback | None = None,
    fitted: Sequence[int] | None = None,
) -> list[int]:
    """Return the most neurons of each layer that decode may hold.

    Args:
        n_layers: of the model.
        d_ff: of each layer.
        modes: that will be used, one after the other.
        keep_ratio: of sets that are cut by it.
        sparse_layers: slice of the layers that become sparse.
        fallback: what similarity mode does for unfamiliar prompts.
        fitted: neurons of each layer in the compensated sets, where they are used.
    """
    if Mode.DENSE in modes or (Mode.SIMILARITY in modes and fallback is Fallback.DENSE):
        return [d_ff] * n_layers
    sparse, by_ratio = parse_layers(sparse_layers, n_layers), n_kept(keep_ratio, d_ff)
    kept = fitted if fitted is not None else [0] * n_layers
    return [max(by_ratio, kept[number]) if number in sparse else d_ff for number in range(n_layers)]


def load_within(
    name: str,
    budget: int,
    use: Callable[[Any, list[MLPLayer]], Use],
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[LanguageModel, MemoryPlan]:
    """Load a model whose dense MLPs stay on disk, for a run that keeps to a memory budget; see `budgeted.load_within`.

    Args:
        name: local checkpoint folder in safetensors format.
        budget: bytes that this process may hold, as the operating system counts them.
        use: given the tokenizer and the MLPs, of which only the shapes are known yet, says what the run will do.
        dtype: auto or the type of the checkpoint, which is kept.
        device: auto or cpu.
        progress: takes the plan, and progress when the store is made.

    Raises:
        BudgetError: the budget is too small; nothing has been loaded then.
    """
    progress = progress or Progress()
    plans: list[MemoryPlan] = []

    def planner(empty: LanguageModel, shape: ModelShape) -> int:
        for engine in AUTO:
            engine_class(engine).warm_up(empty.model)  # now, so that what that takes is counted beforehand
        give_back_memory()
        wanted = use(empty.tokenizer, empty.layers)
        plans.append(plan_budget(budget, shape, wanted, resident_bytes(), peak_bytes()))
        return _checked(plans[0], progress)

    return budgeted.load_within(name, planner, dtype, device, progress), plans[0]


def load_on_device(
    name: str,
    budget: int,
    use: Callable[[Any, list[MLPLayer]], Use],
    dtype: str = "auto",
    device: str = "cuda",
    progress: Progress | None = None,
) -> tuple[LanguageModel, MemoryPlan]:
    """Load a model whose dense MLPs wait in host memory, for a run that keeps to a budget of a device's memory.

    Args:
        name: as `load_model` takes it; the whole model must fit into host memory.
        budget: bytes of the device's memory that this process may hold, as PyTorch's allocator counts them.
        use: as in `load_within`.
        dtype: as in `load_model`; auto: as stored.
        device: of torch.
        progress: takes the plan.

    Raises:
        BudgetError: the budget is too small; nothing has been put on the device then.
    """
    plans: list[MemoryPlan] = []

    def planner(waiting: LanguageModel, shape: ModelShape) -> int:
        plans.append(plan_budget(budget, shape, use(waiting.tokenizer, waiting.layers), 0, on_device=True))
        return _checked(plans[0], progress or Progress(), f" of {device}")

    return budgeted.load_on_device(name, budget, planner, dtype, device), plans[0]


def _checked(plan: MemoryPlan, progress: Progress, place: str = "") -> int:
    """Report a plan that fits, and return how many positions it has room for."""
    plan.check()
    budget, needed = readable_size(plan.budget), readable_size(plan.needed)
    progress.say(f"Memory budget {budget}{place}, planned {needed}: {plan.text()}.")
    return plan.position_limit
