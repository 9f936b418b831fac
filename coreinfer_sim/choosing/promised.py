"""What decode reads for who names no ratio: what a profile of the index allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, SelectionConfig, choice
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Mode, Profile, Weights
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo


@dataclass(frozen=True)
class Promised:
    """Settings in which what follows from a profile is filled in."""

    selection: SelectionConfig
    decode: DecodeConfig
    profile: Profile | None
    """By which they decode; None: something was named that says so itself."""
    why_dense: str | None = None
    """Why decode is dense although nobody asked for that; None: it is not, or somebody did."""


def promised(
    selection: SelectionConfig,
    decode: DecodeConfig,
    index: SemanticIndex | None,
    is_faster: Callable[[str], bool],
    profile: Profile | str | None = None,
) -> Promised:
    """Fill in ratios and the type of weights by a profile, or in similarity mode where none of these is named by the default.

    Args:
        selection: which neurons decode holds, as it was asked for.
        decode: what decodes.
        index: with the profiles that a build or ``tune`` has measured.
        is_faster: whether tokens that choose among rows of a layout decode faster than dense ones here.
        profile: that was asked for; None: the index's default.

    Raises:
        ConfigError: there is no such profile, it was not measured, or it was asked for beside what it decides.
    """
    if profile is None:
        needs_sets = decode.memory_budget is not None or decode.prefill is Prefill.SPARSE
        if index is None or needs_sets or selection.mode_or_ratio is not None:
            return Promised(selection, decode, None)
        if index.manifest.profile is None:
            tune = "'coreinfer-sim tune' measures what it may leave out"
            return _dense(selection, decode, f"Decode is dense, as {index.name} promises nothing yet; {tune}.")
        return _of_measured(Profile.BALANCED, index.manifest.profile, selection, decode, index.name, is_faster)
    asked = choice("profile", profile, Profile)
    if selection.mode_or_ratio is not None:
        raise ConfigError(
            f"the profile {asked.value} was asked for beside {selection.mode_or_ratio}, expected one of them, as a profile "
            "decides what decode reads; leave one out."
        )
    if asked is Profile.EXACT:
        return _dense(selection if index is not None else replace(selection, mode=selection.mode or Mode.DENSE), decode)
    info = measured(index, asked)
    return _of_measured(asked, info, selection, decode, index.name if index is not None else "", is_faster)


def measured(index: SemanticIndex | None, profile: Profile) -> ProfileInfo:
    """Return what was measured for a profile, but for exact, of which nothing needs to be.

    Raises:
        ConfigError: there is no index, or nothing was measured for it.
    """
    if index is None:
        raise ConfigError(
            f"the profile {profile.value} was asked for without an index, which holds what was measured for it; give an index, "
            f"or take the profile {Profile.EXACT.value}."
        )
    if profile.value not in index.manifest.profiles:
        there = ", ".join([Profile.EXACT.value, *index.manifest.profiles])
        raise ConfigError(
            f"{index.name} has no profile {profile.value}, expected one of {there}; 'coreinfer-sim tune' measures balanced and "
            "fast."
        )
    return index.manifest.profiles[profile.value]


def _of_measured(
    profile: Profile,
    info: ProfileInfo,
    selection: SelectionConfig,
    decode: DecodeConfig,
    name: str,
    is_faster: Callable[[str], bool],
) -> Promised:
    """Fill in what was measured, or dense decode where that is better here."""
    if info.is_dense:
        found = f"nothing in {name} that reads fewer bytes keeps perplexity within {info.max_increase:+.1%}"
        return _dense(selection, decode, f"Decode is dense, as {found}; a read ratio asks for it all the same.")
    if decode.weights is None:
        decode = replace(decode, weights=Weights(info.weights))
    if info.weights != decode.weights_type.value:
        both = f"{info.weights} weights, and not with {decode.weights_type.value} ones"
        why = f"Decode is dense, as {name} was measured with {both}; tune it with these, or give a read ratio."
        return _dense(selection, decode, why)
    if info.of_sets and info.keep_ratio < 1:
        if profile is not Profile.BALANCED:  # whose sets are those of the index where no keep ratio is named
            selection = replace(selection, keep_ratio=info.keep_ratio, compensated=info.compensated)
        return Promised(selection, decode, profile)
    dense = _dense(selection, decode)
    if info.of_sets:
        return replace(dense, profile=profile)
    if decode.memory_budget is None and not is_faster(info.layout):
        found = "reading by token was not found to be faster with these weights on a processor of this kind"
        return replace(dense, why_dense=f"Decode is dense, as {found}; a read ratio asks for it all the same.")
    return Promised(replace(dense.selection, read_ratio=info.read_ratio), decode, profile)


def _dense(selection: SelectionConfig, decode: DecodeConfig, why: str | None = None) -> Promised:
    """Let tokens read everything; prompts are still looked up."""
    selection = replace(selection, keep_ratio=1.0, fallback=selection.fallback or Fallback.DENSE)
    return Promised(selection, decode, Profile.EXACT, why)
