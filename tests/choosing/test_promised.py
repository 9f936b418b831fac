"""What decode reads where no ratio is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_index import tiny_index
from tiny_models import tiny_model

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Fallback, Mode, Profile, Weights
from coreinfer_sim.choosing.promised import Promised, promised
from coreinfer_sim.index.manifest import ProfileInfo
from coreinfer_sim.models.mlps import find_mlps

BY_TOKEN = ProfileInfo(1.0, False, 0.03, 1.01, 1.0, 1.02, 100, 12, 0.4, "stored", "bfloat16")
FAST = replace(BY_TOKEN, read_ratio=0.2, max_increase=0.1)
NO_GAIN = replace(BY_TOKEN, read_ratio=1.0, layout="")


@pytest.fixture(scope="module")
def index_with(encoder):
    index = tiny_index(find_mlps(tiny_model("llama")), encoder)

    def made(balanced, fast):
        profiles = {"balanced": balanced, "fast": fast}
        measured = {name: each for name, each in profiles.items() if each is not None}
        index.manifest = replace(index.manifest, profiles=measured)
        return index

    return made


@pytest.fixture
def found(index_with):
    def of(balanced, selection=None, decode=None, profile=None, fast=None, is_faster=lambda layout: True):
        asked = selection or SelectionConfig(), decode or DecodeConfig()
        return promised(*asked, index_with(balanced, fast), is_faster, profile)

    return of


def test_tokens_read_what_the_index_promises(found):
    by_default = found(BY_TOKEN)
    selection = by_default.selection
    assert (selection.keep_ratio, selection.read_ratio, selection.fallback) == (1.0, 0.4, Fallback.DENSE)
    assert (by_default.decode.weights, by_default.profile) == (Weights.STORED, Profile.BALANCED)
    assert by_default.why_dense is None and by_default == found(BY_TOKEN, profile="balanced")
    assert found(BY_TOKEN, SelectionConfig(fallback="global")).selection.fallback is Fallback.GLOBAL


def test_a_profile_that_is_named_decodes(found):
    fast = found(BY_TOKEN, profile="fast", fast=FAST)
    assert (fast.selection.read_ratio, fast.profile, fast.why_dense) == (0.2, Profile.FAST, None)
    exact = found(BY_TOKEN, profile="exact", fast=FAST)
    assert (exact.selection.keep_ratio, exact.selection.read_ratio) == (1.0, None)
    assert (exact.profile, exact.why_dense) == (Profile.EXACT, None)
    assert found(None, profile="exact") == replace(exact, decode=DecodeConfig())


def test_an_index_that_promises_nothing_decodes_densely_and_says_so(found):
    dense = found(None)
    assert (dense.selection.keep_ratio, dense.selection.read_ratio) == (1.0, None)
    assert dense.selection.fallback is Fallback.DENSE and dense.profile is Profile.EXACT
    assert "promises nothing yet" in dense.why_dense and dense.why_dense.endswith(".")


def test_a_profile_without_a_gain_is_not_the_default(found):
    for named in ({}, {"profile": "balanced"}):
        dense = found(NO_GAIN, fast=FAST, **named)
        assert (dense.selection.keep_ratio, dense.selection.read_ratio) == (1.0, None)
        assert dense.profile is Profile.EXACT and "keeps perplexity within +3.0%" in dense.why_dense
    assert found(NO_GAIN, fast=FAST, profile="fast").selection.read_ratio == 0.2


def test_profiles_that_are_not_there(found):
    with pytest.raises(ConfigError, match="has no profile fast, expected one of exact, balanced; 'coreinfer-sim tune'"):
        found(BY_TOKEN, profile="fast")
    with pytest.raises(ConfigError, match="profile is 'fsat', expected one of exact, balanced, fast; nearest: fast"):
        found(BY_TOKEN, profile="fsat")
    with pytest.raises(ConfigError, match="without an index"):
        promised(SelectionConfig(), DecodeConfig(), None, lambda layout: True, "balanced")


def test_a_tuned_type_of_weights_is_taken_unless_another_is_named(found):
    tuned = replace(BY_TOKEN, weights="int8", layout="Q8_0 high")
    by_default = found(tuned)
    assert (by_default.decode.weights, by_default.selection.read_ratio) == (Weights.INT8, 0.4)
    assert by_default.why_dense is None
    for weights in ("stored", "int4"):
        other = found(tuned, decode=DecodeConfig(weights=weights))
        assert (other.decode.weights_type.value, other.selection.keep_ratio) == (weights, 1.0)
        assert other.selection.read_ratio is None
        assert f"measured with int8 weights, and not with {weights} ones" in other.why_dense
    dense = found(replace(tuned, read_ratio=1.0, layout=""))
    assert (dense.decode.weights, dense.selection.keep_ratio) == (Weights.INT8, 1.0)
    assert (dense.selection.read_ratio, dense.why_dense, dense.profile) == (None, None, Profile.BALANCED)


def test_what_is_not_faster_here_is_read_as_a_whole(found):
    asked = []
    slow = found(BY_TOKEN, is_faster=lambda layout: bool(asked.append(layout)))
    assert asked == ["bfloat16"] and slow.selection.read_ratio is None and slow.selection.keep_ratio == 1.0
    assert "not found to be faster" in slow.why_dense and slow.profile is Profile.EXACT
    budget = DecodeConfig(memory_budget=10**9)  # the fewer bytes come from the disk
    named = found(BY_TOKEN, decode=budget, profile="balanced", is_faster=lambda layout: False)
    assert named.selection.read_ratio == 0.4


def test_a_profile_of_sets_is_left_to_the_sets(found):
    sets = replace(NO_GAIN, keep_ratio=0.6)
    by_default = found(sets)
    assert by_default.selection == SelectionConfig() and by_default.why_dense is None
    fast = found(None, profile="fast", fast=sets).selection
    assert (fast.keep_ratio, fast.compensated, fast.read_ratio) == (0.6, False, None)


@pytest.mark.parametrize(
    "said",
    [
        {"keep_ratio": 0.4},
        {"read_ratio": 0.7},
        {"read_ratio": 1.0},
        {"mode": "global"},
        {"mode": "dense"},
        {"score": "paper"},
        {"compensated": False},
        {"sparse_layers": "1:"},
        {"alpha": 0.3},
    ],
    ids=str,
)
def test_what_was_said_stands(found, said):
    asked = SelectionConfig(**said)
    assert found(BY_TOKEN, asked) == Promised(asked, DecodeConfig(), None)
    (name,) = said
    with pytest.raises(ConfigError, match=f"the profile fast was asked for beside {name}"):
        found(BY_TOKEN, asked, profile="fast", fast=FAST)


@pytest.mark.parametrize("said", [{"memory_budget": 10**9}, {"prefill": "sparse"}], ids=str)
def test_decode_that_needs_sets_takes_those_of_the_index(found, said):
    decode = DecodeConfig(**said)
    assert found(BY_TOKEN, decode=decode) == Promised(SelectionConfig(), decode, None)


def test_without_an_index_nothing_is_promised():
    asked = SelectionConfig(), DecodeConfig()
    assert promised(*asked, None, lambda layout: True) == Promised(*asked, None)
    exact = promised(*asked, None, lambda layout: True, "exact")
    assert (exact.selection.mode, exact.profile, exact.why_dense) == (Mode.DENSE, Profile.EXACT, None)
