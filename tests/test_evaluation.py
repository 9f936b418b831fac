"""Evaluation: forced sparse decode, the same numbers as a plain loop, and sums that add up."""

import dataclasses
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from tiny_index import PROMPTS, tiny_index
from tiny_models import tiny_model
from transformers.pytorch_utils import Conv1D

from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Fallback
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor, random_selection
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.compact import installed
from coreinfer_sim.evaluation.contenders import (
    BITS,
    NAMES,
    Chooser,
    Contender,
    bytes_per_token,
    parse_contenders,
    rounded,
    rounded_model,
)
from coreinfer_sim.evaluation.evaluate import Result, evaluate, open_log, read_results, summarise
from coreinfer_sim.evaluation.plot import families, plot
from coreinfer_sim.evaluation.rows import Row, hash_percent, joined, read_rows
from coreinfer_sim.evaluation.scoring import Case
from coreinfer_sim.evaluation.text_scores import normalised, text_scores, token_f1
from coreinfer_sim.evaluation.tune import check_rows, choose_profile, first_and_further, hopeful
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import find_mlps

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


def test_sparse_prefill_scores_a_model_that_is_sparse_throughout(language_model):
    selection = random_selection(language_model.layers, range(len(language_model.layers)), 0.5, seed=1)
    case = Case(language_model, ROWS[0], 256, 0.4)
    with installed(language_model.layers, selection):
        before = case.score()
        with case.read_sparsely():
            sparse = case.score()
        assert case.score() == before != sparse
        prompt, completion = joined(ROWS[0].prompt, ROWS[0].completion)
        ids, new = (language_model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion))
        with torch.no_grad():
            logits = language_model.model(torch.tensor([ids + new])).logits[0, len(ids) : -1]
    assert sparse.loss == pytest.approx(
        F.cross_entropy(logits, torch.tensor(new[1:]), reduction="sum").item(), abs=1e-3
    )


def test_sparse_prefill_goes_through_the_command(tiny_checkpoint, tmp_path):
    row = {"id": "1", "prompt": ROWS[0].prompt, "completion": ROWS[0].completion}
    (tmp_path / "things.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    log = tmp_path / "log.jsonl"
    command = ["evaluate", str(tmp_path / "things.jsonl"), "--model", tiny_checkpoint, "--log", str(log), "--json"]
    done = CliRunner().invoke(main, [*command, "--prefill", "sparse"])
    assert done.exit_code == 0, done.output
    found = [row["contender"] for row in json.loads(done.stdout)]
    assert found == [
        "dense 16bit",
        "random 0.4",
        "dense int8",
        "dense q4_0",
    ]  # what one would take instead is there unasked
    dense = CliRunner().invoke(main, [*command, "--contender", "random"])
    assert dense.exit_code == 1 and "prefill (sparse there, not given here)" in dense.stderr
    refused = CliRunner().invoke(main, [*command, "--prefill", "sparse", "--contender", "griffin"])
    assert refused.exit_code == 1 and "griffin 0.4 chooses by the prompt's own activations" in refused.stderr


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


def test_contenders_that_route(language_model, encoder):
    """Those of the predictors that `generate` uses; what a row pays for depends on its prompt."""
    index = tiny_index(language_model.layers, encoder)
    near, far = (Row("things", str(n), text, "Most owls sleep at night.") for n, text in enumerate([PROMPTS[2], "zzz"]))
    contenders = parse_contenders(["similarity", "hybrid"], [0.4], ["energy"], ["16bit"], ["none", "dense", "hybrid"])
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


def test_rounding_is_closer_with_more_bits_and_leaves_the_original_alone(language_model):
    weight = torch.randn(7, 45)
    kinds = ("16bit", "int8", "q8_0", "q4_0")
    none, int8, q8, q4 = (float((rounded(weight, kind) - weight).abs().mean()) for kind in kinds)
    assert none == 0 < min(int8, q8) <= max(int8, q8) < q4 / 4
    before = {name: value.clone() for name, value in language_model.model.state_dict().items()}
    variant = rounded_model(language_model, "q4_0")
    assert rounded_model(language_model, "16bit") is language_model
    assert all(torch.equal(value, before[name]) for name, value in language_model.model.state_dict().items())
    own = variant.layers[0].output.weight
    assert not torch.equal(own, language_model.layers[0].output.weight)
    assert own is variant.model.get_submodule(_path(variant.model, variant.layers[0].output)).weight


@pytest.mark.parametrize("key", ["llama", "gpt2"])
def test_of_4_bits_all_matrices_but_the_head_have_4(key):
    model = tiny_model(key)
    whole = LanguageModel(model, None, key, find_mlps(model))
    variant = rounded_model(whole, "q4_0").model
    matrices = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    assert len(matrices) > 6
    for name, weight in matrices.items():
        kind = "q8_0" if name == "lm_head" else "q4_0"
        flat = isinstance(model.get_submodule(name), Conv1D)
        wanted = rounded(weight.data.T, kind).T if flat else rounded(weight.data, kind)
        assert torch.equal(variant.get_submodule(name).weight, wanted) and not torch.equal(wanted, weight)
    head, dense = model.lm_head.weight.numel(), NeuronSelection("dense")
    mlp, total = bytes_per_token(whole, dense, "q4_0")
    assert mlp == round(sum(layer.n_bytes for layer in whole.layers) * 4.5 / 32)
    _, in_8_bits = bytes_per_token(whole, dense, "q8_0")
    assert total - head * 8.5 / 8 == pytest.approx((in_8_bits - head * 8.5 / 8) * 4.5 / 8.5, abs=2)


def _path(model, wanted) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def test_bytes_of_a_token(language_model):
    dense = NeuronSelection("dense")
    half = random_selection(language_model.layers, range(len(language_model.layers)), 0.5, seed=0)
    mlp, total = bytes_per_token(language_model, dense, "16bit")
    assert mlp == sum(layer.n_bytes for layer in language_model.layers) / 2  # float32 computes, 16 bits are stored
    parameters = sum(p.numel() * p.element_size() for p in language_model.model.parameters())
    tied = language_model.model.get_output_embeddings().weight is language_model.model.get_input_embeddings().weight
    table = language_model.model.get_input_embeddings().weight
    assert total == (parameters - (0 if tied else table.numel() * table.element_size())) / 2
    mlp_half, total_half = bytes_per_token(language_model, half, "16bit")
    assert mlp_half == pytest.approx(mlp / 2, rel=0.02)
    assert total - total_half == pytest.approx(mlp - mlp_half, abs=1)
    assert bytes_per_token(language_model, dense, "q8_0")[0] == round(mlp * 8.5 / 16)


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
        _result("a", "two", "3", 4, 12.0, 4.0),
        _result("a", "two", "4", 6, 18.0, 6.0),
    ]
    (row,) = summarise(results)
    assert row["sets"]["one"]["ratio"] == pytest.approx(math.exp(0.5), abs=1e-4)
    assert row["sets"]["one"]["perplexity"] == pytest.approx(math.exp(1.5), abs=1e-3)
    assert row["sets"]["two"]["ratio"] == pytest.approx(math.exp(2), abs=1e-4)
    assert row["ratio"] == pytest.approx(math.exp(1.25), abs=1e-3)
    low, high = row["ratio_interval"]
    assert low <= row["ratio"] <= high
    assert (row["kl"], row["same_top"], row["mlp_bytes_per_token"], row["n_rows"]) == (0.5, 0.5, 40, 4)


GENERATE = {"max_new_tokens": 12}


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_a_generated_text_is_that_of_sparse_decode(language_model, keep_ratio):
    selection = random_selection(language_model.layers, range(len(language_model.layers)), keep_ratio, seed=1)
    case = Case(language_model, ROWS[0], 256, 0.4)
    with installed(language_model.layers, selection):
        first, text = case.generate(1), case.generate(12)
        again = case.generate(12)
    prompt, _ = joined(ROWS[0].prompt, ROWS[0].completion)
    ids = language_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = SparseModel(language_model.model, FixedPredictor(selection)).generate(ids, do_sample=False, **GENERATE)
    assert text == again == language_model.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    dense = case.generate(12)
    assert (text == dense) == (keep_ratio == 1.0)
    assert first == case.generate(1) and text.startswith(first)  # the first token is the dense prefill's


def test_a_generated_text_ends_at_an_end_token(language_model, monkeypatch):
    case = Case(language_model, ROWS[0], 256, 0.4)
    tokens = language_model.tokenizer(case.generate(12), add_special_tokens=False)["input_ids"]
    for ends in ([tokens[0]], tokens[0]):
        monkeypatch.setattr(language_model.model.generation_config, "eos_token_id", ends)
        assert Case(language_model, ROWS[0], 256, 0.4).generate(12) == ""


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


def test_scores_of_texts_by_hand():
    assert normalised("The  Owl's an\n“a”") == "owls “ ”"
    assert token_f1("a big dog", "the dog ran") == 0.5
    assert (token_f1("", "the"), token_f1("", "dog")) == (1.0, 0.0)
    same = "owls sleep in old trees by day\nand hunt at night"
    assert text_scores([(f" {same}\n", same)]) == dict.fromkeys(["exact_match", "f1", "rouge_l", "bleu", "chrf"], 100.0)
    cut = text_scores([("Paris!\nQuestion: And", "Paris"), ("the cat sat", "the cat ran")])
    assert (cut["exact_match"], cut["f1"]) == (50.0, 75.0)
    assert cut["rouge_l"] == pytest.approx((100 + 200 / 3) / 2, abs=0.01)
    assert 0 < cut["chrf"] < 100
    assert text_scores([("Paris\nor", "Paris\nor London")])["f1"] == 80.0  # a reference of two lines takes all


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
    with pytest.raises(CorpusError, match="expected an object with id, prompt, completion"):
        read_rows(path, range(0, 100), None)
    path.write_text("nothing\n")
    with pytest.raises(CorpusError, match="line 1, is no JSON"):
        read_rows(path, range(0, 100), None)
    path.write_bytes('{"id": "1", "prompt": "café", "completion": "c"}'.encode("latin-1"))
    with pytest.raises(CorpusError, match="is not UTF-8 .* convert it first"):
        read_rows(path, range(0, 100), None)
    with pytest.raises(CorpusError, match="1 row, .* none whose id hashes .* wider --part"):
        path.write_text(json.dumps(raw[0]))
        read_rows(path, range(hash_percent("t0") + 1, 100), None)
    path.write_text('{"id": "1", "prompt": "p", "completion": 5}\n')
    with pytest.raises(CorpusError, match="line 1: completion is 5, expected text"):
        read_rows(path, range(0, 100), None)
    for empty in ("", '{"id": "1", "prompt": "p", "completion": " "}\n'):
        path.write_text(empty)
        with pytest.raises(CorpusError, match="give a file with rows"):
            read_rows(path, range(0, 100), None)


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
        "dense int8",
        "dense q4_0",
    ]
    assert found[0]["ratio"] == 1.0
    assert json.loads(out.read_text())["contenders"] == found
    assert len(log.read_text().splitlines()) == 1 + 14
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0 and len(log.read_text().splitlines()) == 1 + 14
    assert "griffin 0.5" in table.stdout
    refused = CliRunner().invoke(main, [*arguments, "--contender", "similarity"])
    assert refused.exit_code == 1 and "needs an index" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--part", "9:3"]).exit_code == 2


def test_the_command_generates(tiny_checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "things.jsonl"
    path.write_text("\n".join(json.dumps({"id": r.id, "prompt": r.prompt, "completion": r.completion}) for r in ROWS))
    (tmp_path / "others.jsonl").write_text(path.read_text())
    arguments = ["evaluate", str(path), str(tmp_path / "others.jsonl"), "--model", tiny_checkpoint]
    arguments += ["--contender", "dense", "--contender", "griffin", "--generate", "--max-new-tokens", "5"]
    done = CliRunner().invoke(main, [*arguments, "--json", "--plot", str(tmp_path / "a.svg")])
    assert done.exit_code == 0, done.stderr
    dense, griffin = json.loads(done.stdout)
    assert set(dense["sets"]) == {"things", "others"}
    assert dense["text"] == dense["sets"]["things"]["text"] == dense["sets"]["others"]["text"]
    assert set(griffin["text"]) == {"exact_match", "f1", "rouge_l", "bleu", "chrf"}
    assert (tmp_path / "a.svg").exists()
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0 and table.stdout.count("mean over sets") == 2
    each = CliRunner().invoke(main, [*arguments, "--per-set"])
    assert each.exit_code == 0 and len(each.stdout.splitlines()) == len(table.stdout.splitlines()) + 2 + 4
    lines = [line.split() for line in each.stdout.splitlines() if re.match(r"griffin 0.4 +things +\d", line)]
    line = lines[0]  # the other is of the generated texts
    assert float(line[3]) == pytest.approx(griffin["sets"]["things"]["perplexity"], abs=0.01)
    assert line[-1] == str(len(ROWS))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as if it were not installed
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "scoring generated texts needs sacrebleu" in refused.stderr


CONTENDERS = parse_contenders(["dense", "griffin", "similarity"], [0.8, 0.4], ["energy"], ["16bit", "q4_0"])


def _summary() -> list[dict]:
    """Rows as `summarise` makes them: the fewer bytes, the worse."""
    return [
        {
            "contender": str(c),
            "ratio": 1 / (c.keep_ratio * BITS[c.weights] / 16),
            "ratio_interval": [0.9, 12.0],
            "total_bytes_per_token": 1e8 * c.keep_ratio * BITS[c.weights] / 16,
        }
        for c in CONTENDERS
    ]


def test_a_plot_has_a_line_a_family():
    found = families(_summary(), CONTENDERS)
    assert list(found) == [
        "dense",
        "griffin 16bit",
        "griffin q4_0",
        "similarity/energy 16bit",
        "similarity/energy q4_0",
    ]
    assert [c.weights for c, _ in found["dense"]] == ["q4_0", "16bit"]
    assert [c.keep_ratio for c, _ in found["griffin 16bit"]] == [0.4, 0.8]


def test_a_plot_is_written_whole_and_names_what_it_shows(tmp_path):
    plot(_summary(), CONTENDERS, tmp_path / "a.png")
    plot(_summary(), CONTENDERS, tmp_path / "a.svg", {"as it came": (5e7, 1.0)})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    text = (tmp_path / "a.svg").read_text()
    for shown in ("dense", "similarity/energy q4_0", "as it came", "weights read per decoded token (MB)"):
        assert f"<!-- {shown} -->" in text  # matplotlib draws text as paths and keeps it in a comment
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    rows = tmp_path / "things.jsonl"
    rows.write_text(json.dumps({"id": "1", "prompt": "p", "completion": "c"}))

    def refused(name: str) -> str:
        done = CliRunner().invoke(main, ["evaluate", str(rows), "--model", "./none", "--plot", str(tmp_path / name)])
        assert done.exit_code == 1
        return done.stderr

    assert "expected a name that ends in .png or .svg" in refused("a.pdf")
    assert "no folder" in refused("none/a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert "a plot needs matplotlib, not found here; install the extra eval" in refused("a.png")


def test_what_would_be_lost_or_mixed_up_is_refused_before_the_model_loads(tmp_path):
    line = json.dumps({"id": "1", "prompt": "p", "completion": "c"}) + "\n"
    (tmp_path / "a").mkdir()
    for name, lines in (("things.jsonl", line), ("a/things.jsonl", line), ("twice.jsonl", line * 2)):
        (tmp_path / name).write_text(lines)

    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["evaluate", *arguments, "--model", "./none", "--contender", "dense"])
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        return done.stderr

    things = str(tmp_path / "things.jsonl")
    assert "there is no folder" in refused(things, "--out", str(tmp_path / "none" / "out.json"))
    assert "two sets are called things" in refused(things, str(tmp_path / "a" / "things.jsonl"))
    assert "two rows of twice have the id '1'" in refused(str(tmp_path / "twice.jsonl"))
    assert "keep ratio is 1.5" in refused(things, "--keep-ratio", "1.5")


def test_scores_of_other_texts_under_the_same_name_are_not_taken(language_model):
    contenders = parse_contenders(["dense"], [0.5], ["energy"], ["16bit"])
    first = evaluate(language_model, contenders, ROWS)
    (owls,) = (Row("things", "1", "What do owls do?", "Most owls hunt at night, and some by day."),)
    said = []

    class Told(Progress):
        def say(self, message: str) -> None:
            said.append(message)

    again = evaluate(language_model, contenders, [ROWS[0], owls], finished=first, progress=Told())
    assert said == ["Not taken from the earlier run, as they are of other texts: 1 score."]
    assert [r.row_digest for r in again] == [ROWS[0].digest, owls.digest]
    assert again[0] == first[0] and again[1].n_tokens > first[1].n_tokens


def test_an_interval_needs_two_rows_of_every_set_and_is_as_wide_as_their_difference():
    pair = [_result("a", "one", str(n), 1, loss, 0.0) for n, loss in enumerate((0.0, 2.0))]
    (row,) = summarise(pair)
    low, high = row["ratio_interval"]
    spread = math.sqrt(2)  # draws are 0, 1 or 2 away; of two rows the variance of the mean is twice theirs
    assert (low, high) == (pytest.approx(math.exp(1 - spread), abs=1e-3), pytest.approx(math.exp(1 + spread), abs=1e-3))
    (row,) = summarise([*pair, _result("a", "two", "1", 1, 1.0, 0.0)])
    assert row["ratio_interval"] is None


def test_tuning_wants_rows_of_every_set():
    check_rows(["a"] * 8 + ["b"] * 2)
    with pytest.raises(ConfigError, match="there are 9 rows to tune on, expected 10"):
        check_rows(["a"] * 9)
    with pytest.raises(ConfigError, match="there is one row of b, expected 2 or more of every set"):
        check_rows(["a"] * 9 + ["b"])


def test_a_long_prompt_keeps_the_token_that_stands_before_every_text(language_model):
    tokenizer = language_model.tokenizer
    row = Row("long", "1", "one two three four " * 20, "five six seven")
    plain = Case(language_model, row, 16, 0.4)._ids[0].tolist()
    ids = tokenizer(joined(row.prompt, row.completion)[0])["input_ids"]
    assert plain == ids[-8:]
    begins = dataclasses.replace(language_model, tokenizer=WithBeginning(tokenizer))
    cut = Case(begins, row, 16, 0.4)._ids[0].tolist()
    assert cut == [WithBeginning.bos_token_id, *ids[-7:]]


class WithBeginning:
    """A tokenizer that puts a token before every text, as Llama's does."""

    bos_token_id = 3

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, add_special_tokens=True, **options):
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


def test_texts_longer_than_the_context_are_refused(language_model):
    with pytest.raises(ConfigError, match="max_tokens is 100000, but the model's context is"):
        evaluate(language_model, [Contender("dense")], ROWS, max_tokens=100_000)


def test_all_contenders_leave_dense_what_the_index_did_not_record(language_model, encoder):
    index = tiny_index(language_model.layers, encoder, [1, 2])
    chooser = Chooser(language_model, index, seed=0)
    case = Case(language_model, ROWS[0], 256, 0.4)
    for contender in parse_contenders(["random", *NAMES[2:]], [0.5], ["energy"], ["16bit"]):
        assert sorted(chooser.choose(contender, case).ids) == [1, 2], contender


def test_a_log_goes_on_only_with_the_same_setup(tmp_path):
    path = tmp_path / "log.jsonl"
    with open_log(path, {"model": "a", "max_tokens": 8}) as file:
        file.write("{}\n")
    with open_log(path, {"model": "a", "max_tokens": 8}):
        pass
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match=r"scores of other settings – max_tokens \(8 there, 9 here\) –"):
        open_log(path, {"model": "a", "max_tokens": 9})
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="no log of evaluate"):
        open_log(path, {})


def summary_of(**bounds):
    return [
        {"contender": name, "ratio": high - 0.01, "ratio_interval": [1.0, high], "mlp_bytes_per_token": n, "n_rows": 5}
        for name, (high, n) in bounds.items()
    ]


def test_the_profile_is_the_fewest_bytes_that_keep_the_promise():
    tried = [Contender("similarity", ratio) for ratio in (0.4, 0.6, 0.8)]
    names = [str(contender) for contender in tried]
    summary = summary_of(**dict(zip(names, [(1.2, 40), (1.04, 60), (1.01, 80)], strict=True)))
    found = choose_profile(tried, summary, 0.05, 100)
    assert (found.keep_ratio, found.mlp_bytes, found.high, found.n_rows) == (0.6, 60, 1.04, 5)
    assert choose_profile(tried, summary, 0.5, 100).keep_ratio == 0.4
    dense = choose_profile(tried, summary, 0.005, 100)
    assert (dense.keep_ratio, dense.ratio, dense.mlp_bytes, dense.compensated) == (1.0, 1.0, 100, False)


def test_of_as_many_bytes_the_profile_takes_the_sets_that_cost_less():
    tried = [Contender("similarity", 0.6, compensated=compensated) for compensated in (True, False)]
    for highs in ((1.04, 1.02), (1.02, 1.04)):
        rounded_off = zip(tried, highs, (60_001, 60_000), strict=True)
        summary = summary_of(**{str(each): (high, n_bytes) for each, high, n_bytes in rounded_off})
        found = choose_profile(tried, summary, 0.05, 100)
        assert (found.compensated, found.high) == (highs[0] < highs[1], 1.02)


def test_hopeless_keep_ratios_are_dropped_early():
    rows = [Row(name, str(n), "p", "c") for name in ("a", "b") for n in range(20)]
    first, further = first_and_further(rows)
    assert first == [*rows[:5], *rows[20:25]] and further == [*rows[5:20], *rows[25:]]
    assert first_and_further(rows[:36]) == (rows[:36], [])  # 9 rows would say too little
    tried = [Contender("similarity", ratio) for ratio in (0.4, 0.6, 0.8)]
    names = [str(contender) for contender in tried]
    summary = summary_of(**dict(zip(names, [(1.2, 40), (1.1, 60), (1.01, 80)], strict=True)))
    for row, low in zip(summary, (1.101, 1.09, 1.0), strict=True):
        row["ratio_interval"] = [low, 1.3]
    assert hopeful(tried, summary, 0.05) == tried[1:]


@pytest.mark.parametrize("n_rows", [1, 12])
def test_rows_of_which_none_can_be_scored_are_refused(tiny_checkpoint, tmp_path, n_rows):
    rows = [{"id": str(i), "prompt": "What is it?", "completion": "x"} for i in range(n_rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [str(tmp_path / "rows.jsonl"), "--model", tiny_checkpoint, "--contender", "dense"]
    refused = CliRunner().invoke(main, ["evaluate", *arguments])
    assert refused.exit_code == 1 and f"none of {n_rows} row" in refused.stderr and not refused.stdout


def test_a_log_goes_on_after_a_line_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    with open_log(log, {"seed": 0}) as file:
        file.write('{"half')
    result = Result("dense 16bit", "s", "1", 2, 1.0, 1.0, 0.0, 2, None, 1, 1)
    with open_log(log, {"seed": 0}) as file:
        file.write(json.dumps(asdict(result)) + "\n")
    assert read_results(log) == [result]
