"""Loading a model under a memory budget: what the longest text will hold is planned before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, Prefill, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.memory import peak_bytes, resident_bytes
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Mode, Score, Weights
from coreinfer_sim.choosing.index_sets import default_sets
from coreinfer_sim.engines.calibration import passages
from coreinfer_sim.engines.registry import AUTO, engine_class
from coreinfer_sim.engines.sizes import DiskParts
from coreinfer_sim.generation.memory_plan import Use, load_on_device, load_within, most_kept, plan_by_token
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer
from coreinfer_sim.models.prompts import Message, prompt_ids


@dataclass(frozen=True)
class Longest:
    """The longest text that a memory budget is planned for."""

    prompt: str | list[Message] = ""
    chat: bool = False
    max_new_tokens: int = 128
    num_beams: int = 1
    modes: tuple[str, ...] = ()
    """Modes that will be used; none: the selection's."""


def load_within_budget(
    name: str,
    index: SemanticIndex | None,
    selection: SelectionConfig,
    decode: DecodeConfig,
    loading: ModelConfig,
    longest: Longest,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model whose dense MLPs stay away: on disk, or for a GPU in host memory.

    Args:
        name: of the model; on a CPU a local checkpoint folder.
        index: routes prompts.
        selection: which neurons decode holds.
        decode: with the budget in bytes.
        loading: type and device.
        longest: text that will be generated.
        progress: receives the plan.

    Raises:
        BudgetError: the budget is too small; nothing has been loaded then.
        ConfigError: settings that have no plan.
    """
    if decode.weights_type is not Weights.STORED:
        raise ConfigError(
            f"{decode.weights_type.value} weights are made from the stored ones, for which a memory budget has no plan; leave "
            "out the weights or the budget."
        )
    assert decode.memory_budget is not None
    modes = [Mode(mode) for mode in longest.modes or (selection.named_mode.value,)]
    keep_ratio, compensated = _sets(selection, modes, index)
    fitted = index.manifest.fitted_neurons(keep_ratio) if index is not None and compensated else None
    on_cpu = loading.device in ("auto", "cpu")
    lookup_bytes = _lookup_bytes(index, selection) if on_cpu else 0
    engine = engine_class(AUTO[-1] if decode.engine == "auto" else decode.engine)

    def use(tokenizer: Any, layers: Sequence[MLPLayer]) -> Use:
        n_held = most_kept(
            len(layers),
            layers[0].d_ff,
            modes,
            keep_ratio,
            selection.sparse_layers or (":" if index is None else index.recorded),
            selection.fallback,
            fitted,
        )
        return Use(
            n_kept=n_held,
            n_prompt=prompt_ids(tokenizer, name, longest.prompt, longest.chat).shape[1],
            n_new=longest.max_new_tokens,
            compensated=fitted is not None,
            n_sequences=longest.num_beams,
            streams=decode.prefill is Prefill.DENSE,
            held_by=lambda neuron_bytes: engine.plan(neuron_bytes, n_held, decode).held,
            lookup_bytes=lookup_bytes,
        )

    load = load_within if on_cpu else load_on_device
    return load(name, decode.memory_budget, use, loading.dtype, loading.device, progress)[0]


def load_by_token_within_budget(
    name: str,
    index: SemanticIndex | None,
    selection: SelectionConfig,
    decode: DecodeConfig,
    loading: ModelConfig,
    longest: Longest,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model of which each token reads the neurons that it chooses from the disk, but for those that the budget holds.

    Args:
        name: of the model, a local checkpoint folder.
        index: routes prompts.
        selection: which neurons decode holds and reads.
        decode: with the budget in bytes.
        loading: type and device.
        longest: text that will be generated.
        progress: receives the plan.

    Raises:
        BudgetError: the budget is too small; nothing has been loaded then.
        ConfigError: settings that have no plan.
    """
    assert decode.memory_budget is not None
    budget = decode.memory_budget
    for given, what in (
        (selection.keep_ratio not in (None, 1.0), "a keep ratio"),
        (decode.prefill is Prefill.SPARSE, "sparse prefill"),
        (loading.dtype not in ("auto", "stored"), f"the dtype {loading.dtype}"),
        (loading.device not in ("auto", "cpu"), f"the device {loading.device}"),
    ):
        if given:
            raise ConfigError(
                f"{what} was asked for, but where tokens choose what they read under a memory budget, all neurons may be chosen, "
                "as they are stored, on a CPU; leave it out, or the read ratio, or the budget."
            )
    lookup_bytes = _lookup_bytes(index, selection)
    engine = engine_class(AUTO[0] if decode.engine == "auto" else decode.engine)

    def planner(empty: LanguageModel, parts: DiskParts) -> tuple[int, int]:
        engine.warm_up(empty.model)
        n_prompt = prompt_ids(empty.tokenizer, name, longest.prompt, longest.chat).shape[1]
        use = Use([], n_prompt, longest.max_new_tokens, n_sequences=longest.num_beams, lookup_bytes=lookup_bytes)
        n_measured = max(len(ids) for ids in passages(empty.tokenizer))
        return plan_by_token(budget, parts, use, n_measured, progress or Progress())

    loaded = engine.load_within(name, decode, planner, progress)
    if loaded is None:
        raise ConfigError(
            f"{name} is no local checkpoint folder of a model whose tokens the engine {engine.name} lets choose what they read; "
            "leave out the read ratio, or the memory budget."
        )
    return loaded


def _lookup_bytes(index: SemanticIndex | None, selection: SelectionConfig) -> int:
    """Let go of the encoder between prompts, and return what embedding one takes."""
    if index is None:
        return 0
    index.keeps_encoder = False
    index.warm_up(routed=selection.named_mode in (Mode.SIMILARITY, Mode.HYBRID))
    return peak_bytes() - resident_bytes()


def _sets(selection: SelectionConfig, modes: Sequence[Mode], index: SemanticIndex | None) -> tuple[float, bool]:
    """Return the keep ratio, and whether compensated sets may be held."""
    if selection.keep_ratio is not None:
        return selection.keep_ratio, selection.compensated and selection.score is Score.ENERGY
    sparse = next((mode for mode in modes if mode is not Mode.DENSE), None)  # the others are compared with it
    if sparse is None:
        return 1.0, False
    if index is None:
        raise ConfigError(f"mode {sparse.value} has no index to take the keep ratio from; give a keep ratio.")
    return default_sets(index, sparse, selection.score, selection.compensated)
