"""Contenders, crossed and chosen for: the sets of neurons that `generate` would take."""

from __future__ import annotations

import pytest
import torch
from scored import ROWS
from tiny_index import PROMPTS, tiny_index

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import Fallback
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.evaluation.cases import Case
from coreinfer_sim.evaluation.choosing import Chooser
from coreinfer_sim.evaluation.contenders import NAMES, Contender, parse_contenders
from coreinfer_sim.evaluation.run import evaluate


@pytest.fixture(scope="module")
def engine(language_model):
    return choose_engines(language_model.model, language_model.layers, DecodeConfig())[0][0]


def test_contenders_are_crossed_once():
    found = parse_contenders(["dense", "griffin"], [0.4, 0.6], ["energy", "paper"], ["16bit", "q8_0"])
    assert [str(c) for c in found] == [
        "dense 16bit",
        "griffin 0.4",
        "griffin 0.6",
        "dense q8_0",
        "griffin 0.4 q8_0",
        "griffin 0.6 q8_0",
    ]
    fallbacks = parse_contenders(["similarity", "hybrid"], [0.4], ["paper"], ["16bit"], ["none", "hybrid"])
    assert [str(c) for c in fallbacks] == [
        "similarity/paper 0.4",
        "similarity/paper else hybrid 0.4",
        "hybrid/paper 0.4",
    ]
    ways = ["dense", "similarity/compensated else global", "global/paper", "hybrid/energy"]
    named = parse_contenders(ways, [0.4], ["energy"], ["16bit"], ["hybrid"])  # which concern bare names alone
    assert [c.way for c in named[1:]] == ways[1:]
    assert [named[1].compensated, named[1].fallback] == [True, Fallback.GLOBAL]
    for wrong in (
        "best",
        "griffin/energy",
        "global else dense",
        "similarity nearest 4",
        "similarity/odd",
        "dense 16bit",
    ):
        with pytest.raises(ConfigError, match=f"no contender '{wrong}', expected one of dense, .* or a way"):
            parse_contenders([wrong], [0.4], ["energy"], ["16bit"])
    with pytest.raises(ConfigError, match="hybrid has no compensated sets"):
        parse_contenders(["hybrid/compensated"], [0.4], ["energy"], ["16bit"])
    with pytest.raises(ConfigError, match="no contender 'best'"):
        Contender("best")
    with pytest.raises(ConfigError, match="no weights '3bit'"):
        Contender("dense", weights="3bit")


def test_contenders_whose_tokens_choose():
    names = ["dense", "all", "griffin"]
    found = parse_contenders(names, [0.5], ["energy"], ["16bit", "int8", "q8_0"], read_ratios=[0.3, 0.5])
    assert [str(c) for c in found] == [
        "dense 16bit",
        "all 1 read 0.3",
        "all 1 read 0.5",
        "griffin 0.5 read 0.3",
        "griffin 0.5 read 0.5",
        "dense int8",
        "all 1 read 0.3 int8",
        "all 1 read 0.5 int8",
        "griffin 0.5 read 0.3 int8",
        "griffin 0.5 read 0.5 int8",
        "dense q8_0",
        "griffin 0.5 q8_0",
    ]
    assert found[6].family == "all by token int8" != Contender("all", weights="int8").family
    assert [c.read_ratio for c in found[:3]] == [1.0, 0.3, 0.5]
    (whole,) = parse_contenders(["all"], [0.5], ["energy"], ["16bit"], read_ratios=[1.0])
    assert str(whole) == "all 1"
    for ratio in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"read ratio is {ratio}, expected a number above 0 and at most 1"):
            parse_contenders(["all"], [0.5], ["energy"], ["16bit"], read_ratios=[ratio])
    for kind in ("q8_0", "q4_0"):
        with pytest.raises(ConfigError, match=f"{kind} weights are read as a whole; give a read ratio to 16bit, int8"):
            Contender("all", weights=kind, read_ratio=0.5)
    assert Contender("all", weights="q8_0").read_ratio == 1.0


def test_contenders_that_route(language_model, engine, encoder):
    """Those of the predictors that `generate` uses; what a row pays for depends on its prompt."""
    index = tiny_index(language_model.layers, encoder)
    near, far = (
        Row(str(n), text, completion="Most owls sleep at night.", set_name="things")
        for n, text in enumerate([PROMPTS[2], "zzz"])
    )
    contenders = parse_contenders(["similarity", "hybrid"], [0.4], ["energy"], ["16bit"], ["none", "dense", "hybrid"])
    chooser = Chooser(language_model, index, seed=0)
    for row, familiar in ((near, True), (far, False)):
        case = Case(language_model, engine, row, 256, 0.4)
        for contender in contenders:
            chosen = chooser.choose(contender, case)
            predictor = make_predictor(
                contender.name,
                language_model.layers,
                index,
                keep_ratio=0.4,
                fallback=contender.fallback,
            )
            (expected,) = predictor.select([row.prompt], case.statistics, 1)
            assert chosen.ids.keys() == expected.ids.keys()
            assert all(torch.equal(chosen.ids[n], expected.ids[n]) for n in expected.ids)
            falls_back = not familiar and contender.fallback.value != "none"
            assert chosen.mode == (contender.fallback.value if falls_back else contender.name)
            assert (chosen.confident, chosen.cluster) == (familiar, expected.cluster)
    results = evaluate(language_model, contenders, [near, far], index)
    assert len(results) == 2 * len(contenders)
    by_name = {(r.contender, r.row_id): r.loss for r in results}
    assert by_name["similarity/energy else hybrid 0.4", "0"] == by_name["similarity/energy 0.4", "0"]
    assert by_name["similarity/energy else hybrid 0.4", "1"] == by_name["hybrid/energy 0.4", "1"]


def test_all_contenders_leave_dense_what_the_index_did_not_record(language_model, engine, encoder):
    index = tiny_index(language_model.layers, encoder, [1, 2])
    chooser = Chooser(language_model, index, seed=0)
    case = Case(language_model, engine, ROWS[0], 256, 0.4)
    for contender in parse_contenders(["random", *NAMES[2:]], [0.5], ["energy"], ["16bit"]):
        assert sorted(chooser.choose(contender, case).ids) == [1, 2], contender
