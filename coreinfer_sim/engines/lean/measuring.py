"""How much each neuron is estimated to count where texts are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from coreinfer_sim.base.progress import Progress
from coreinfer_sim.engines.lean.blocks import LeanModel
from coreinfer_sim.engines.lean.forced import forced_states
from coreinfer_sim.engines.lean.instructions import Products
from coreinfer_sim.engines.lean.matrix import Array
from coreinfer_sim.engines.lean.thresholds import (
    Histograms,
    keep_histograms,
    kept_histograms,
    name_of,
    sound_histograms,
)
from coreinfer_sim.models.fingerprint import weights_checksum
from coreinfer_sim.models.mlps import MLPLayer

_FIRST = 8  # positions of a passage that are left out
FASTER_BY_TOKEN = {
    Products.VNNI_512: ("float32", "bfloat16", "float16", "Q8_0 high", "Q4_K high"),
    Products.AVX2: ("bfloat16",),
}
"""Layouts of which less than half of the neurons decode faster than all, by the processor's instructions; see the project's
figures. What was not measured is not there."""
Text = tuple[torch.Tensor, int]
"""Token ids [n_tokens], and how many of them stand before those that count."""


def measured_histograms(
    weights: LeanModel, n_layers: int, dtype: torch.dtype, texts: Sequence[Text], report: Callable[[int], None]
) -> Histograms:
    """Count the estimates at the positions of texts, which are read densely.

    Args:
        weights: of the model; its MLPs are laid out by neuron.
        n_layers: of the model.
        dtype: in which keys and values are cached.
        texts: of at least one that has positions which count.
        report: takes 1 after each text.
    """
    found = Histograms.empty(n_layers)
    for ids, n_first in texts:

        def mlp(number: int, x: torch.Tensor, n_first: int = n_first) -> torch.Tensor:
            own = weights.token_mlp(number)
            found.add(number, own.contributions(x[n_first:], weights.kind))
            return own.whole_outputs(x, weights.kind)

        with torch.inference_mode():
            forced_states(weights, dtype, ids, None, mlp)
        report(1)
    return found


def named_histograms(
    weights: LeanModel, n_layers: int, dtype: torch.dtype, texts: Sequence[Text], report: Callable[[int], None]
) -> dict[str, Array]:
    """Return such counts under the name by which an index knows them."""
    name = name_of(layout_of(weights, n_layers))
    return {name: measured_histograms(weights, n_layers, dtype, texts, report).counts}


def layout_of(weights: LeanModel, n_layers: int) -> str:
    """Return what the rows are, all of which are laid out now: later their weights may have been taken over."""
    return "-".join(sorted({weights.token_mlp(number).kind for number in range(n_layers)}))


def known_or_measured(
    weights: LeanModel,
    layers: Sequence[MLPLayer],
    dtype: torch.dtype,
    passages: Callable[[], Sequence[torch.Tensor]],
    progress: Progress,
    known: Mapping[str, Array],
) -> Histograms:
    """Return the histograms of an index where they fit, or else of passages, which are measured once; see `Engine.calibrate`."""
    kind, n_layers = layout_of(weights, len(layers)), len(layers)
    counts = known.get(name_of(kind))
    found = None if counts is None else sound_histograms(counts, n_layers)
    if found is not None:
        return found
    fingerprint, texts = weights_checksum(layers), passages()
    found = kept_histograms(fingerprint, kind, texts, n_layers)
    if found is None:
        progress.start("Measuring what tokens need", len(texts), "passages")
        pairs = [(ids, _FIRST) for ids in texts]
        found = measured_histograms(weights, n_layers, dtype, pairs, progress.advance)
        progress.finish()
        keep_histograms(found, fingerprint, kind, texts)
    return found
