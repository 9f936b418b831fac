"""Contenders over rows: scores of the engine that decodes, and runs that go on."""

from __future__ import annotations

import json
import weakref

import pytest
from scored import ROWS
from tiny_index import tiny_index

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError, UnknownEngineError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.evaluation import run
from coreinfer_sim.evaluation.contenders import Contender, parse_contenders
from coreinfer_sim.evaluation.results import Result, read_results
from coreinfer_sim.evaluation.run import evaluate
from coreinfer_sim.generation.in_process import TextGenerator

GENERATE = {"max_new_tokens": 12}
FIELDS = (
    "contender",
    "set_name",
    "row_id",
    "n_tokens",
    "n_same_top",
    "cluster",
    "mlp_bytes",
    "total_bytes",
    "row_digest",
)


@pytest.fixture(scope="module")
def index(language_model, encoder):
    return tiny_index(language_model.layers, encoder)


def test_scores_are_those_of_the_engine_that_decodes(language_model, index, monkeypatch):
    contenders = parse_contenders(["dense", "random", "similarity", "griffin", "oracle"], [0.4], ["energy"], ["16bit"])
    found, asked = {}, []
    for kind in (LeanEngine, TransformersEngine):
        forced = kind.forced

        def noted(engine, *given, forced=forced):
            asked.append(engine.name)
            return forced(engine, *given)

        monkeypatch.setattr(kind, "forced", noted)
        found[kind.name] = evaluate(language_model, contenders, ROWS, index, decode=DecodeConfig(engine=kind.name))
        assert set(asked) == {kind.name}
        asked.clear()
    assert len(found["lean"]) == len(contenders) * len(ROWS)
    for lean, other in zip(found["lean"], found["transformers"], strict=True):
        assert [getattr(lean, name) for name in FIELDS] == [getattr(other, name) for name in FIELDS]
        for name in ("loss", "dense_loss", "kl"):
            assert getattr(lean, name) == pytest.approx(getattr(other, name), abs=1e-3)
    with pytest.raises(UnknownEngineError, match="no engine 'best'"):
        evaluate(language_model, contenders, ROWS, index, decode=DecodeConfig(engine="best"))


@pytest.mark.parametrize(
    ("mode", "engine", "weights"),
    [
        ("dense", "lean", "16bit"),
        ("random", "lean", "16bit"),
        ("similarity", "lean", "16bit"),
        ("similarity", "transformers", "16bit"),
        ("global", "lean", "int8"),
    ],
)
def test_bytes_are_those_that_generate_reports(language_model, index, mode, engine, weights):
    ratio = 1.0 if mode == "dense" else 0.4
    results = evaluate(
        language_model, [Contender(mode, ratio, weights=weights)], ROWS, index, decode=DecodeConfig(engine)
    )
    selection = SelectionConfig(mode, ratio, fallback="none")
    decode = DecodeConfig(engine, "int8" if weights == "int8" else "stored")
    with TextGenerator(language_model, index, selection, decode) as generator:
        for row, result in zip(ROWS, results, strict=True):
            found = generator.generate(row.prompt, max_new_tokens=6)
            assert (found.engine, found.selection.cluster) == (engine, result.cluster)
            assert result.mlp_bytes == found.mlp_bytes_per_token
            assert result.total_bytes == found.total_bytes_per_token


def test_fewer_bits_cost_quality(language_model):
    contenders = parse_contenders(["dense"], [1.0], ["energy"], ["16bit", "int8", "q8_0", "q4_0"])
    kl, n_bytes = {}, {}
    for result in evaluate(language_model, contenders, ROWS):
        kl[result.contender] = kl.get(result.contender, 0.0) + result.kl
        n_bytes[result.contender] = result.total_bytes
    assert (
        abs(kl["dense 16bit"]) < 1e-4 < kl["dense q8_0"] < kl["dense q4_0"]
        and 1e-4 < kl["dense int8"] < kl["dense q4_0"]
    )
    assert n_bytes["dense 16bit"] > n_bytes["dense q8_0"] > n_bytes["dense q4_0"]


def test_one_reference_of_a_row_serves_all_weights_and_one_kind_is_held_at_a_time(language_model, monkeypatch):
    kinds = ["int8", "16bit", "q8_0", "int4", "q4_0"]
    contenders = parse_contenders(["dense", "griffin"], [0.5], ["energy"], kinds)
    alone = [r for kind in kinds for r in evaluate(language_model, [c for c in contenders if c.weights == kind], ROWS)]
    n_dense, made, engines = 0, [], []
    forced, engine_for = LeanEngine.forced, run.engine_for

    def counted(engine, *given):
        nonlocal n_dense
        n_dense += engine.config.weights is Weights.STORED and not given[-1].layers
        return forced(engine, *given)

    def noted(whole, kind, config):
        assert kind == "16bit" or not any(each() for each in engines)
        model, engine = engine_for(whole, kind, config)
        made.append(kind)
        if kind != "16bit":
            engines.append(weakref.ref(engine))
        return model, engine

    monkeypatch.setattr(LeanEngine, "forced", counted)
    monkeypatch.setattr(run, "engine_for", noted)
    monkeypatch.setattr(run, "_ROWS_AT_ONCE", 1)
    together = evaluate(language_model, contenders, ROWS)
    assert n_dense == 2 * len(ROWS)  # the reference, and the contender of 16 bits
    assert made == ["16bit", "int8", "q8_0", "int4", "q4_0", "int4", "q8_0", "int8"]

    def order(result):
        return result.contender, result.row_id

    assert sorted(together, key=order) == sorted(alone, key=order)


def test_a_rerun_computes_only_what_is_missing(language_model, tmp_path):
    contenders = parse_contenders(["dense", "griffin", "oracle", "stability", "random"], [0.5], ["energy"], ["16bit"])
    with (tmp_path / "log").open("w") as log:
        first = evaluate(language_model, contenders, ROWS, log=log)
    assert len(first) == 2 * len(contenders)
    text = (tmp_path / "log").read_text()
    (tmp_path / "log").write_text(text[: len(text) - 20])  # a kill cut the last line short
    known = read_results(tmp_path / "log")
    assert known == first[:-1]
    (marked,) = [r for r in known if r.contender == "griffin 0.5" and r.row_id == "0"]
    changed = [Result(**{**vars(r), "loss": 123.0}) if r == marked else r for r in known]
    again = evaluate(language_model, contenders, ROWS, finished=changed)
    assert [r.loss for r in again if r.contender == "griffin 0.5" and r.row_id == "0"] == [123.0]
    assert {(r.contender, r.row_id) for r in again} == {(r.contender, r.row_id) for r in first}


def test_texts_are_generated_again_only_where_they_are_missing(language_model, tmp_path):
    contenders = parse_contenders(["dense", "griffin"], [0.5], ["energy"], ["16bit", "q8_0"])
    old = evaluate(language_model, contenders, ROWS)
    assert all(r.text is None for r in old)
    path = tmp_path / "log"
    added = ("text", "reference", "max_new_tokens")
    lines = [{k: v for k, v in vars(r).items() if k not in added} for r in old]  # as before texts were generated
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_results(path) == old
    with path.open("a") as log:
        new = evaluate(language_model, contenders, ROWS, finished=read_results(path), log=log, **GENERATE)
    assert len(new) == len(old) and all(r.text and r.reference and r.max_new_tokens == 12 for r in new)
    assert [r.loss for r in new] == [r.loss for r in old]
    known = read_results(path)
    assert len(known) == 2 * len(old)
    assert evaluate(language_model, contenders, ROWS, finished=known, **GENERATE) == new
    assert evaluate(language_model, contenders, ROWS, finished=known) == new  # one for each row and contender
    shorter = evaluate(language_model, contenders, ROWS, finished=known, max_new_tokens=1)
    assert all(r.max_new_tokens == 1 and r.text != known[-1].text for r in shorter)
    with pytest.raises(ConfigError, match="prompts of up to 512 tokens and 600 new ones"):
        evaluate(language_model, contenders, ROWS, max_new_tokens=600)


def test_scores_of_other_texts_under_the_same_name_are_not_taken(language_model):
    contenders = parse_contenders(["dense"], [0.5], ["energy"], ["16bit"])
    first = evaluate(language_model, contenders, ROWS)
    (owls,) = (Row("1", "What do owls do?", completion="Most owls hunt at night, and some by day.", set_name="things"),)
    said = []

    class Told(Progress):
        def say(self, message: str) -> None:
            said.append(message)

    again = evaluate(language_model, contenders, [ROWS[0], owls], finished=first, progress=Told())
    assert said == ["Not taken from the earlier run, as they are of other texts: 1 score."]
    assert [r.row_digest for r in again] == [ROWS[0].digest, owls.digest]
    assert again[0] == first[0] and again[1].n_tokens > first[1].n_tokens


def test_texts_longer_than_the_context_are_refused(language_model):
    with pytest.raises(ConfigError, match="max_tokens is 100000, but the model's context is"):
        evaluate(language_model, [Contender("dense")], ROWS, max_tokens=100_000)
