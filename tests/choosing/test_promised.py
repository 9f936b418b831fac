"""What decode reads where no ratio is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_index import tiny_index
from tiny_models import tiny_model

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.settings import Fallback, Weights
from coreinfer_sim.choosing.promised import promised
from coreinfer_sim.index.manifest import ProfileInfo
from coreinfer_sim.models.mlps import find_mlps

BY_TOKEN = ProfileInfo(1.0, False, 0.03, 1.01, 1.0, 1.02, 100, 12, 0.4, "stored", "bfloat16")


@pytest.fixture(scope="module")
def index_with(encoder):
    index = tiny_index(find_mlps(tiny_model("llama")), encoder)

    def made(profile):
        index.manifest = replace(index.manifest, profile=profile)
        return index

    return made


@pytest.fixture
def found(index_with):
    def of(profile, selection=None, decode=None):
        return promised(
            selection or SelectionConfig(), decode or DecodeConfig(), index_with(profile), lambda layout: True
        )

    return of


def test_tokens_read_what_the_index_promises(found):
    selection, decode, why = found(BY_TOKEN)
    assert (selection.keep_ratio, selection.read_ratio, selection.fallback) == (1.0, 0.4, Fallback.DENSE)
    assert decode.weights is Weights.STORED and why is None
    selection, _, _ = found(BY_TOKEN, SelectionConfig(fallback="global"))
    assert selection.fallback is Fallback.GLOBAL


def test_an_index_that_promises_nothing_decodes_densely_and_says_so(found):
    selection, _, why = found(None)
    assert (selection.keep_ratio, selection.read_ratio, selection.fallback) == (1.0, None, Fallback.DENSE)
    assert "promises nothing yet" in why and why.endswith(".")


def test_a_tuned_type_of_weights_is_taken_unless_another_is_named(found):
    tuned = replace(BY_TOKEN, weights="int8", layout="Q8_0 high")
    selection, decode, why = found(tuned)
    assert (decode.weights, selection.read_ratio, why) == (Weights.INT8, 0.4, None)
    for weights in ("stored", "int4"):
        selection, decode, why = found(tuned, decode=DecodeConfig(weights=weights))
        assert (decode.weights_type.value, selection.keep_ratio, selection.read_ratio) == (weights, 1.0, None)
        assert f"measured with int8 weights, and not with {weights} ones" in why
    dense = replace(tuned, read_ratio=1.0, layout="")
    selection, decode, why = found(dense)
    assert (decode.weights, selection.keep_ratio, selection.read_ratio, why) == (Weights.INT8, 1.0, None, None)


def test_what_is_not_faster_here_is_read_as_a_whole(index_with):
    asked = []
    selection, _, why = promised(
        SelectionConfig(), DecodeConfig(), index_with(BY_TOKEN), lambda layout: bool(asked.append(layout))
    )
    assert asked == ["bfloat16"] and selection.read_ratio is None and selection.keep_ratio == 1.0
    assert "not found to be faster" in why


def test_a_profile_of_sets_is_left_to_the_sets(found):
    selection, _, why = found(replace(BY_TOKEN, keep_ratio=0.6, read_ratio=1.0, layout=""))
    assert selection == SelectionConfig() and why is None


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
    assert found(BY_TOKEN, asked) == (asked, DecodeConfig(), None)


@pytest.mark.parametrize("said", [{"memory_budget": 10**9}, {"prefill": "sparse"}], ids=str)
def test_decode_that_needs_sets_takes_those_of_the_index(found, said):
    decode = DecodeConfig(**said)
    assert found(BY_TOKEN, decode=decode) == (SelectionConfig(), decode, None)


def test_without_an_index_nothing_is_promised():
    asked = SelectionConfig(), DecodeConfig()
    assert promised(*asked, None, lambda layout: True) == (*asked, None)
