"""Evaluation: forced sparse decode, the same numbers as a plain loop, and sums that add up."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from tiny_index import PROMPTS, tiny_index

from coreinfer_sim.errors import ConfigError, CorpusError
from coreinfer_sim.evaluation.contenders import (
    Chooser,
    Contender,
    bytes_per_token,
    parse_contenders,
    rounded,
    rounded_model,
)
from coreinfer_sim.evaluation.evaluate import Result, evaluate, read_results, summarise
from coreinfer_sim.evaluation.rows import Row, hash_percent, joined, read_rows
from coreinfer_sim.evaluation.scoring import Case
from coreinfer_sim.models import load_model
from coreinfer_sim.predictors import make_predictor, random_selection
from coreinfer_sim.selection import NeuronSelection
from coreinfer_sim.sparse_mlp import installed

ROWS = [
    Row("things", str(n), f"What do {noun} do?", f"Most {noun} sleep at night.")
    for n, noun in enumerate(["cats", "owls"])
]


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint):
    return load_model(tiny_checkpoint, "float32")


def stepwise_loss(language_model, row: Row, selection: NeuronSelection) -> tuple[float, int]:
    """Prefill densely, then feed the completion token by token through compact MLPs."""
    model, tokenizer = language_model.model, language_model.tokenizer
    prompt, completion = joined(row.prompt, row.completion)
    ids, new = tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
        loss = 0.0
        with installed(language_model.layers, selection):
            for token, following in zip(new, new[1:], strict=False):
                logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
                loss += F.cross_entropy(logits, torch.tensor(following)).item()
    return loss, len(new) - 1


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_scores_are_those_of_decoding_token_by_token(language_model, keep_ratio):
    n_layers = len(language_model.layers)
    selection = random_selection(language_model.layers, range(n_layers), keep_ratio, seed=1)
    case = Case(language_model, ROWS[0], 256, 0.4)
    with installed(language_model.layers, selection):
        score = case.score()
    loss, n_tokens = stepwise_loss(language_model, ROWS[0], selection)
    assert score.n_tokens == n_tokens
    assert score.loss == pytest.approx(loss, abs=1e-3)
    if keep_ratio == 1.0:
        assert score.loss == pytest.approx(case.reference_loss, abs=1e-3)
        assert score.kl == pytest.approx(0, abs=1e-4)
        assert score.n_same_top == n_tokens
    else:
        assert score.kl > 1e-3


def test_the_first_token_of_a_completion_is_dense_and_not_scored(language_model):
    with pytest.raises(CorpusError, match="expected at least 1 and 2"):
        Case(language_model, Row("things", "1", "What do cats do?", "a"), 256, 0.4)


def test_statistics_of_the_prompt_and_of_the_completion(language_model):
    case = Case(language_model, ROWS[0], 256, 0.4)
    oracle = case.oracle_statistics(language_model)
    assert set(case.statistics) == set(oracle) == set(range(len(language_model.layers)))
    n_prompt = len(language_model.tokenizer(joined(*_texts(ROWS[0]))[0])["input_ids"])
    n_new = len(language_model.tokenizer(ROWS[0].completion, add_special_tokens=False)["input_ids"])
    assert case.statistics[0].energy.sum() == pytest.approx(n_prompt, rel=1e-3)  # each token's energies sum to one
    assert oracle[0].energy.sum() == pytest.approx(n_new - 1, rel=1e-3)


def _texts(row: Row) -> tuple[str, str]:
    return row.prompt, row.completion


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
    blended = parse_contenders(["similarity", "global"], [0.4], ["energy"], ["q8_0"], [1, 4])
    assert [str(c) for c in blended] == [
        "similarity/energy 0.4 q8_0",
        "similarity/energy 0.4 nearest 4 q8_0",
        "global/energy 0.4 q8_0",
    ]
    fallbacks = parse_contenders(["similarity", "hybrid"], [0.4], ["paper"], ["16bit"], [2], ["none", "hybrid"])
    assert [str(c) for c in fallbacks] == [
        "similarity/paper 0.4 nearest 2",
        "similarity/paper 0.4 nearest 2 else hybrid",
        "hybrid/paper 0.4 nearest 2",
    ]
    with pytest.raises(ConfigError, match="no contender 'best'"):
        Contender("best")
    with pytest.raises(ConfigError, match="no weights '3bit'"):
        Contender("dense", weights="3bit")


def test_contenders_that_route(language_model, encoder):
    """Those of the predictors that `generate` uses; what a row pays for depends on its prompt."""
    index = tiny_index(language_model.layers, encoder)
    near, far = (Row("things", str(n), text, "Most owls sleep at night.") for n, text in enumerate([PROMPTS[2], "zzz"]))
    contenders = parse_contenders(
        ["similarity", "hybrid"], [0.4], ["energy"], ["16bit"], [1, 2], ["none", "dense", "hybrid"]
    )
    chooser = Chooser(language_model, index, seed=0)
    for row, familiar in ((near, True), (far, False)):
        case = Case(language_model, row, 256, 0.4)
        for contender in contenders:
            chosen = chooser.choose(contender, case)
            predictor = make_predictor(
                contender.name,
                language_model.layers,
                index,
                keep_ratio=0.4,
                nearest=contender.nearest,
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
    assert by_name["similarity/energy 0.4 else hybrid", "0"] == by_name["similarity/energy 0.4", "0"]
    assert by_name["similarity/energy 0.4 else hybrid", "1"] == by_name["hybrid/energy 0.4", "1"]


def test_rounding_is_closer_with_more_bits_and_leaves_the_original_alone(language_model):
    weight = torch.randn(7, 45)
    errors = [float((rounded(weight, kind) - weight).abs().mean()) for kind in ("16bit", "q8_0", "q4_0")]
    assert errors[0] == 0 < errors[1] < errors[2] / 4
    before = {name: value.clone() for name, value in language_model.model.state_dict().items()}
    variant = rounded_model(language_model, "q4_0")
    assert rounded_model(language_model, "16bit") is language_model
    assert all(torch.equal(value, before[name]) for name, value in language_model.model.state_dict().items())
    own = variant.layers[0].output.weight
    assert not torch.equal(own, language_model.layers[0].output.weight)
    assert own is variant.model.get_submodule(_path(variant.model, variant.layers[0].output)).weight


def _path(model, wanted) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def test_bytes_of_a_token(language_model):
    dense = NeuronSelection("dense")
    half = random_selection(language_model.layers, range(len(language_model.layers)), 0.5, seed=0)
    mlp, total = bytes_per_token(language_model, dense, "16bit")
    assert mlp == sum(layer.n_bytes for layer in language_model.layers)
    parameters = sum(p.numel() * p.element_size() for p in language_model.model.parameters())
    tied = language_model.model.get_output_embeddings().weight is language_model.model.get_input_embeddings().weight
    table = language_model.model.get_input_embeddings().weight
    assert total == parameters - (0 if tied else table.numel() * table.element_size())
    mlp_half, total_half = bytes_per_token(language_model, half, "16bit")
    assert mlp_half == pytest.approx(mlp / 2, rel=0.02)
    assert total - total_half == mlp - mlp_half
    assert bytes_per_token(language_model, dense, "q8_0")[0] == round(mlp * 8.5 / 32)  # from float32


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


def _result(contender: str, set_name: str, row_id: str, n_tokens: int, loss: float, dense_loss: float) -> Result:
    return Result(contender, set_name, row_id, n_tokens, loss, dense_loss, 0.5 * n_tokens, n_tokens // 2, None, 40, 100)


def test_sums_by_hand():
    results = [
        _result("a", "one", "1", 2, 2.0, 1.0),
        _result("a", "one", "2", 2, 4.0, 3.0),
        _result("a", "two", "3", 10, 30.0, 10.0),
    ]
    (row,) = summarise(results)
    assert row["sets"]["one"]["ratio"] == pytest.approx(math.exp(0.5), abs=1e-4)
    assert row["sets"]["one"]["perplexity"] == pytest.approx(math.exp(1.5), abs=1e-3)
    assert row["sets"]["two"]["ratio"] == pytest.approx(math.exp(2), abs=1e-4)
    assert row["ratio"] == pytest.approx(math.exp(1.25), abs=1e-3)
    low, high = row["ratio_interval"]
    assert low <= row["ratio"] <= high
    assert (row["kl"], row["same_top"], row["mlp_bytes_per_token"], row["n_rows"]) == (0.5, 0.5, 40, 3)


def test_rows_by_part(tmp_path):
    path = tmp_path / "things.jsonl"
    raw = [{"id": f"t{n}", "prompt": f"p{n}", "completion": "c"} for n in range(200)]
    path.write_text("\n".join(map(json.dumps, raw)))
    low, high = (read_rows(path, part, None) for part in (range(0, 70), range(70, 100)))
    assert {r.id for r in low} | {r.id for r in high} == {r["id"] for r in raw}
    assert not {r.id for r in low} & {r.id for r in high}
    assert all(hash_percent(r.id) < 70 for r in low)
    assert len(read_rows(path, range(0, 100), 7)) == 7
    path.write_text('{"id": "1", "prompt": "p"}\n')
    with pytest.raises(CorpusError, match="expected completion too"):
        read_rows(path, range(0, 100), None)
    path.write_text("nothing\n")
    with pytest.raises(CorpusError, match="is no JSONL"):
        read_rows(path, range(0, 100), None)
    with pytest.raises(CorpusError, match="no row whose id hashes"):
        path.write_text(json.dumps(raw[0]))
        read_rows(path, range(hash_percent("t0") + 1, 100), None)


def test_the_command(tiny_checkpoint, tmp_path):
    path = tmp_path / "things.jsonl"
    path.write_text("\n".join(json.dumps({"id": r.id, "prompt": r.prompt, "completion": r.completion}) for r in ROWS))
    out, log = tmp_path / "out.json", tmp_path / "log.jsonl"
    arguments = ["evaluate", str(path), "--model", tiny_checkpoint, "--keep-ratio", "0.5", "--log", str(log)]
    done = CliRunner().invoke(main, [*arguments, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["contender"] for row in found] == [
        "dense 16bit",
        "random 0.5",
        "stability 0.5",
        "griffin 0.5",
        "oracle 0.5",
    ]
    assert found[0]["ratio"] == 1.0
    assert json.loads(out.read_text())["contenders"] == found
    assert len(log.read_text().splitlines()) == 10
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0 and len(log.read_text().splitlines()) == 10
    assert "griffin 0.5" in table.stdout
    refused = CliRunner().invoke(main, [*arguments, "--contender", "similarity"])
    assert refused.exit_code == 1 and "needs an index" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--part", "9:3"]).exit_code == 2
