"""`coreinfer-sim generate --memory-budget`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coreinfer_sim.base.errors import ConfigError

from . import options
from .console import ConsoleProgress

if TYPE_CHECKING:
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import LanguageModel


def load(name: str, given: dict[str, Any], modes: list[str], index: SemanticIndex | None, first: str) -> LanguageModel:
    """Load a model under the command's budget; the longest text that is planned for begins with the prompt ``first``."""
    from coreinfer_sim.base.memory import peak_bytes, resident_bytes
    from coreinfer_sim.base.settings import Fallback, Mode
    from coreinfer_sim.generation.memory_plan import Use, load_on_device, load_within, most_kept
    from coreinfer_sim.models.prompts import prompt_ids

    if given["weights"] == "int8":
        raise ConfigError(
            "int8 weights are copies beside the stored ones, for which a memory budget has no plan; leave out --weights or "
            "--memory-budget."
        )
    keep_ratio, compensated = _sets(given, modes, index)
    fitted = index.manifest.fitted_neurons(keep_ratio) if index is not None and compensated else None
    on_cpu = given["device"] in ("auto", "cpu")
    lookup_bytes = 0
    if index is not None and on_cpu:
        index.keeps_encoder = False
        index.warm_up(routed=given["mode"] in ("similarity", "hybrid"))
        lookup_bytes = peak_bytes() - resident_bytes()

    def use(tokenizer: Any, layers: list[Any]) -> Use:
        prompt = options.messages(first, given["chat"], given["system"])
        fallback = given["fallback"]
        return Use(
            n_kept=most_kept(
                len(layers),
                layers[0].d_ff,
                [Mode(mode) for mode in modes],
                keep_ratio,
                given["layers"],
                None if fallback is None else Fallback(fallback),
                fitted,
            ),
            n_prompt=prompt_ids(tokenizer, name, prompt, given["chat"]).shape[1],
            n_new=given["max_new_tokens"],
            compensated=fitted is not None,
            n_sequences=given["num_beams"],
            n_caches=1 if given["refresh"] is None else 2,
            streams=given["prefill"] == "dense",
            held_twice=given["engine"] == "compiled",
            lookup_bytes=lookup_bytes,
        )

    progress = ConsoleProgress()
    load_model = load_within if on_cpu else load_on_device
    return load_model(name, given["memory_budget"], use, given["dtype"], given["device"], progress)[0]


def _sets(given: dict[str, Any], modes: list[str], index: SemanticIndex | None) -> tuple[float, bool]:
    """Return the keep ratio, and whether compensated sets may be taken."""
    from coreinfer_sim.base.settings import Mode, Score
    from coreinfer_sim.choosing.index_sets import default_sets

    score = Score(given["score"])
    if given["keep_ratio"] is not None:
        return float(given["keep_ratio"]), given["compensation"] and score is Score.ENERGY
    sparse = next((mode for mode in modes if mode != "dense"), None)  # the others are compared with it
    if sparse is None:
        return 1.0, False
    if index is None:
        raise ConfigError(f"mode {sparse} was given no keep ratio and no index to take it from; give one.")
    return default_sets(index, Mode(sparse), score, given["compensation"])
