"""What decode reads for who names no ratio: what the index's promise allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, SelectionConfig
from coreinfer_sim.base.settings import Fallback, Mode, Score, Weights
from coreinfer_sim.index.index import SemanticIndex


def promised(
    selection: SelectionConfig,
    decode: DecodeConfig,
    index: SemanticIndex | None,
    is_faster: Callable[[str], bool],
) -> tuple[SelectionConfig, DecodeConfig, str | None]:
    """Fill in ratios and the type of weights where similarity mode is asked for and none is named.

    Args:
        selection: which neurons decode holds, as it was asked for.
        decode: what decodes.
        index: with the profile that a build or ``tune`` has measured.
        is_faster: whether tokens that choose among rows of a layout decode faster than dense ones here.

    Returns:
        Both settings, and in words why decode is dense, if it is.
    """
    if index is None or not _is_open(selection, decode):
        return selection, decode, None
    dense = replace(selection, keep_ratio=1.0, fallback=selection.fallback or Fallback.DENSE)
    profile = index.manifest.profile
    if profile is None:
        tune = "'coreinfer-sim tune' measures what it may leave out"
        return dense, decode, f"Decode is dense, as {index.name} promises nothing yet; {tune}."
    if decode.weights is None:
        decode = replace(decode, weights=Weights(profile.weights))
    if profile.weights != decode.weights_type.value:
        both = f"{profile.weights} weights, and not with {decode.weights_type.value} ones"
        why = f"Decode is dense, as {index.name} was measured with {both}; tune it with these, or give a read ratio."
        return dense, decode, why
    if profile.of_sets:
        return (dense if profile.keep_ratio == 1 else selection), decode, None
    if not is_faster(profile.layout):
        found = "reading by token was not found to be faster with these weights on a processor of this kind"
        return dense, decode, f"Decode is dense, as {found}; a read ratio asks for it all the same."
    return replace(dense, read_ratio=profile.read_ratio), decode, None


def _is_open(selection: SelectionConfig, decode: DecodeConfig) -> bool:
    """Return whether nothing was said that sets or ratios follow from."""
    said = (
        selection.keep_ratio is not None,
        selection.read_ratio is not None,
        selection.alpha is not None,
        selection.sparse_layers is not None,
        selection.score is not Score.ENERGY,
        not selection.compensated,
        decode.memory_budget is not None,
        decode.prefill is Prefill.SPARSE,
    )
    return selection.named_mode is Mode.SIMILARITY and not any(said)
