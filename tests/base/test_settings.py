"""Settings: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import (
    BuildConfig,
    CompensationConfig,
    CorpusConfig,
    Fallback,
    Mode,
    Score,
    parse_layers,
    template_parts,
)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_ratios_lie_above_0_and_at_most_at_1(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is {value}, expected a number above 0 and at most 1"):
        BuildConfig(**{name: value})


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("value", [1.0, 1e-9])
def test_the_ends_of_a_ratio_are_allowed(name, value):
    assert getattr(BuildConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["batch_size", "shard_size", "clusters"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_are_at_least_1(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is {value}, expected 1 or more"):
        BuildConfig(**{name: value})
    assert getattr(BuildConfig(**{name: 1}), name) == 1


def test_clusters_are_a_number_or_auto():
    assert BuildConfig(clusters="auto").clusters == "auto"
    with pytest.raises(ConfigError, match="'many', expected a number or 'auto'"):
        BuildConfig(clusters="many")


@pytest.mark.parametrize(("name", "value", "smallest"), [("limit", 0, 1), ("limit", -1, 1), ("max_tokens", 1, 2)])
def test_corpus_counts_have_a_smallest_value(name, value, smallest):
    with pytest.raises(ConfigError, match=f"{name} is {value}, expected {smallest} or more"):
        CorpusConfig("prompts.jsonl", **{name: value})
    assert getattr(CorpusConfig("prompts.jsonl", **{name: smallest}), name) == smallest


def test_settings_cannot_change_after_they_were_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BuildConfig().alpha = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        CorpusConfig("prompts.jsonl").limit = 0


def test_settings_survive_json():
    config = BuildConfig(clusters=7, alpha=0.3, layers="4:", batch_size=2)
    assert BuildConfig(**json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{question}", [("question", True)]),
        ("Q: {The question}\n{a}", [("Q: ", False), ("The question", True), ("\n", False), ("a", True)]),
        ("{a}{a}", [("a", True), ("a", True)]),
        ("{{x}} {a.b[0]:d!r}", [("{", False), ("x", False), ("}", False), (" ", False), ("a.b[0]:d!r", True)]),
        ("{0} {ünï cødé}", [("0", True), (" ", False), ("ünï cødé", True)]),
    ],
)
def test_a_template_names_its_columns(template, parts):
    assert template_parts(template) == parts
    assert CorpusConfig("prompts.jsonl", template=template).template == template


@pytest.mark.parametrize("template", ["", "no column", "{}", "{{a}}", "{a", "a}", "{a{b}", "{a}}"])
def test_a_template_without_columns_is_refused(template):
    with pytest.raises(ConfigError, match="template"):
        CorpusConfig("prompts.jsonl", template=template)


@pytest.mark.parametrize("separator", ["", ";;", "colon"])
def test_a_separator_is_one_character_or_its_name(separator):
    with pytest.raises(ConfigError, match="separator"):
        CorpusConfig("a.csv", separator=separator)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":", [0, 1, 2, 3, 4, 5]),
        ("4:", [4, 5]),
        (":2", [0, 1]),
        ("2:4", [2, 3]),
        ("-2:", [4, 5]),
        ("::2", [0, 2, 4]),
        ("3", [3]),
        ("-1", [5]),
        (" 1 : 3 ", [1, 2]),
        ("4:99", [4, 5]),
        ("6", []),
        ("-7", []),
        ("9:", []),
    ],
)
def test_layers_follow_python_slices(text, expected):
    assert parse_layers(text, 6) == expected


@pytest.mark.parametrize("text", ["", " ", "a", "1:b", "1:2:3:4", "1.5", "1,2", "::0"])
def test_layers_that_are_no_slice_are_refused(text):
    with pytest.raises(ConfigError, match="layers"):
        BuildConfig(layers=text)
    with pytest.raises(ConfigError, match="layers"):
        parse_layers(text, 6)


def test_closed_choices_compare_to_their_text():
    assert Score("paper") is Score.PAPER and Score.ENERGY == "energy"
    assert {mode.value for mode in Mode} == {"similarity", "hybrid", "stability", "global", "random", "all", "dense"}
    assert {fallback.value for fallback in Fallback} == {"hybrid", "dense", "global", "none"}


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_ratios": ()},
        {"keep_ratios": (1.0,)},
        {"keep_ratios": (0.4, 0.5, 0.4)},
        {"keep_ratios": (0.4, 0.4 + 1e-9)},
        {"tokens": 0},
        {"distil_tokens": -1},
    ],
)
def test_impossible_settings_of_compensation_are_refused(settings):
    with pytest.raises(ConfigError):
        CompensationConfig(**settings)
