"""Contenders whose tokens read a share of the neurons."""

from __future__ import annotations

import json

import pytest
from scored import ROWS
from tiny_index import tiny_index

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.evaluation.contenders import Contender, parse_contenders
from coreinfer_sim.evaluation.run import evaluate
from coreinfer_sim.evaluation.summary import summarise
from coreinfer_sim.generation.in_process import TextGenerator


def by_name(results):
    return {(result.contender, result.row_id): result for result in results}


def test_more_reading_is_nearer_to_dense(language_model):
    ratios = [0.2, 0.5, 0.9]
    contenders = parse_contenders(["dense", "all"], [], ["energy"], ["16bit", "int8", "int4"], read_ratios=ratios)
    summary = {row["contender"]: row for row in summarise(evaluate(language_model, contenders, ROWS))}
    for kind in ("", " int8", " int4"):
        rows = [summary[f"all 1 read {ratio:g}{kind}"] for ratio in ratios]
        assert rows[0]["kl"] > rows[1]["kl"] > rows[2]["kl"]
        assert [row["read_ratio"] for row in rows] == pytest.approx(ratios, abs=0.1)
        assert rows[0]["mlp_bytes_per_token"] < rows[1]["mlp_bytes_per_token"] < rows[2]["mlp_bytes_per_token"]
        assert rows[2]["kl"] < summary["dense int4"]["kl"] * (30 if kind == " int4" else 3)
    assert summary["dense 16bit"]["read_ratio"] == 1.0


def test_dense_weights_score_the_same_beside_contenders_whose_tokens_choose(language_model):
    """Their layouts share nothing that would change a product."""
    dense = [Contender("dense", weights=kind) for kind in ("16bit", "int8")]
    reading = [Contender("all", weights=kind, read_ratio=0.5) for kind in ("16bit", "int8")]
    alone = by_name(evaluate(language_model, dense, ROWS))
    for order in ([*dense, *reading], [*reading, *dense]):
        together = by_name(evaluate(language_model, order, ROWS))
        assert {key: together[key] for key in alone} == alone


@pytest.mark.parametrize("name", ["random", "griffin", "oracle", "stability", "random-cluster", "global", "similarity"])
def test_held_sets_are_read_by_token(language_model, encoder, name):
    index = tiny_index(language_model.layers, encoder)
    contenders = parse_contenders([name], [0.6], ["energy"], ["16bit"], ["none"], [0.3, 1.0])
    assert [contender.read_ratio for contender in contenders] == [0.3, 1.0]
    found = evaluate(language_model, contenders, ROWS, index)
    for result in found:
        most = 0.35 if "read" in result.contender else 0.65
        assert most / 3 < result.read_ratio < most


@pytest.mark.parametrize("weights", ["16bit", "int8"])
def test_bytes_and_shares_are_those_that_generate_reports(language_model, weights):
    """Of the same tokens, which the rows' completions are."""
    selection = SelectionConfig("all", read_ratio=0.4)
    decode = DecodeConfig(weights="stored" if weights == "16bit" else weights)
    generator = TextGenerator(language_model, None, selection, decode)
    result = evaluate(language_model, [Contender("all", weights=weights, read_ratio=0.4)], ROWS[:1])[0]
    mlp = generator.engines[0]._weights.token_mlp(0)
    run = generator.generate(ROWS[0].prompt, max_new_tokens=result.n_tokens + 1, ignore_eos=True)
    for share, n_bytes in ((result.read_ratio, result.mlp_bytes), (run.read_ratio, run.mlp_bytes_per_token)):
        neurons = share * 3 * mlp.n_ff
        assert n_bytes == pytest.approx(3 * mlp.estimate_bytes + neurons * mlp.record_bytes, abs=1)
    assert run.read_ratio == pytest.approx(result.read_ratio, abs=0.15)


def test_a_log_keeps_the_share(language_model, tmp_path):
    contenders = [Contender("all", read_ratio=0.5)]
    with (tmp_path / "log").open("w") as log:
        results = evaluate(language_model, contenders, ROWS, log=log)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["read_ratio"] for line in lines] == [result.read_ratio for result in results]


def test_an_engine_that_reads_all_is_refused(language_model):
    with pytest.raises(ConfigError, match="the engine transformers reads all held neurons"):
        evaluate(language_model, [Contender("all", read_ratio=0.5)], ROWS, decode=DecodeConfig("transformers"))
