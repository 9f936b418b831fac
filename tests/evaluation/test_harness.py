"""The model of lm-eval: its scores are those of decoding token by token, and a task runs end to end, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_index import build_tiny_index

from coreinfer_sim.base.errors import ConfigError, PromptError, UnknownEngineError
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.evaluation.harness import CoreInferLM
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps

QUESTIONS = ["What do owls do?", "What do stars do?", "What do courts do?", "What do cats do?"]
CHOICES = [" They sleep at night.", " They shine.", " They judge."]
DOCUMENT = "Most owls sleep by day and hunt at night, and most courts do it the other way round. " * 3


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def pairs(*arguments: tuple[str, str]) -> list[Instance]:
    return requests("loglikelihood", *arguments)


@pytest.fixture(scope="module")
def harness(tiny_checkpoint):
    """Make the model of lm-eval, in float32."""

    def make(**arguments: Any) -> CoreInferLM:
        return CoreInferLM(**{"model": tiny_checkpoint, "mode": "random", "dtype": "float32", **arguments})

    return make


@pytest.fixture(scope="module")
def own(tiny_checkpoint):
    """Make lm-eval's own dense model."""
    loaded = load_model(tiny_checkpoint, "float32")

    def make(**arguments: Any) -> HFLM:
        return HFLM(loaded.model, tokenizer=loaded.tokenizer, **arguments)

    return make


@pytest.fixture(scope="module")
def index(tiny_checkpoint, encoder, tmp_path_factory) -> Path:
    config = BuildConfig(clusters=3, gamma=0.5)
    return build_tiny_index(tiny_checkpoint, tmp_path_factory.mktemp("harness"), config, encoder)


@torch.inference_mode()
def stepwise(lm: CoreInferLM, prompt: list[int], targets: list[int], n_dense: int) -> float:
    """Feed all tokens but the last, those that predict the targets after the first ``n_dense`` through compact MLPs."""
    model = lm.model
    selection = make_predictor("random", find_mlps(lm.model), keep_ratio=0.3).select(None, None, 1)[0]
    tokens = [*prompt, *targets]
    begin = len(prompt) + n_dense - 1
    output = model(torch.tensor([tokens[:begin]]), use_cache=True)
    logits = list(output.logits[0, begin - n_dense :])
    with installed(find_mlps(lm.model), selection):
        for token in tokens[begin:-1]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0, -1])
    return sum(row.log_softmax(-1)[token].item() for row, token in zip(logits, targets, strict=True))


def test_a_continuation_is_decoded_from_its_dense_context(harness):
    lm = harness(keep_ratio=0.3)
    found = lm.loglikelihood(pairs(*((QUESTIONS[0], choice) for choice in CHOICES)))
    for choice, (score, _) in zip(CHOICES, found, strict=True):
        context = lm.tok_encode(QUESTIONS[0])
        continuation = lm.tok_encode(QUESTIONS[0] + choice)[len(context) :]
        assert score == pytest.approx(stepwise(lm, context, continuation, 0), abs=1e-3)


def test_nothing_is_lost_at_keep_ratio_1(harness, own):
    lm = harness(keep_ratio=1.0)
    long = DOCUMENT * 20
    asked = pairs(
        (QUESTIONS[0], CHOICES[0]), ("", "Owls sleep."), (QUESTIONS[1], " a"), (long, CHOICES[1]), (" ", "x y")
    )
    for mine, theirs in zip(lm.loglikelihood(asked), own().loglikelihood(asked[:4]), strict=False):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3) and mine[1] == theirs[1]


def test_a_greedy_continuation_is_known_as_one(harness):
    lm = harness(keep_ratio=1.0)  # below, generate's first token is the dense prefill's
    (text,) = lm.generate_until(requests("generate_until", (QUESTIONS[0], {"max_gen_toks": 6})))
    ids = lm.tok_encode(text)
    context = lm.tok_encode(QUESTIONS[0])
    assert lm.score_context(context, [ids, [*ids[:-1], ids[-1] + 1]])[0][1] is True
    assert lm.score_context(context, [[*ids[:-1], ids[-1] + 1]])[0][1] is False


@pytest.mark.parametrize("max_length", [16, 1024])
def test_rolling_at_keep_ratio_1_is_lm_evals_own(harness, own, max_length):
    asked = requests("loglikelihood_rolling", (DOCUMENT,), ("Owls.",), ("",))
    mine = harness(keep_ratio=1.0, max_length=max_length, rolling_prompt=5).loglikelihood_rolling(asked)
    assert mine[:2] == pytest.approx(own(max_length=max_length).loglikelihood_rolling(asked[:2]), abs=1e-2)
    assert mine[2] == 0


def test_a_documents_beginning_is_dense_and_its_rest_is_decoded(harness):
    lm = harness(keep_ratio=0.3, rolling_prompt=7)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (DOCUMENT,)))
    wanted = stepwise(lm, [lm.prefix_token_id], lm.tok_encode(DOCUMENT), 7)
    assert found == pytest.approx(wanted, abs=1e-2)


def test_texts_are_generated_as_by_sparse_decode(harness):
    lm = harness(keep_ratio=0.3, batch_size=2)
    asked = requests("generate_until", *((question, {"max_gen_toks": 8}) for question in QUESTIONS))
    found = lm.generate_until(asked)
    sparse = SparseModel(lm.model, make_predictor("random", find_mlps(lm.model), keep_ratio=0.3))
    for question, text in zip(QUESTIONS, found, strict=True):
        ids = lm.tokenizer(question, return_tensors="pt")["input_ids"]
        wanted = sparse.generate(ids, max_new_tokens=8, do_sample=False)
        assert text == lm.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    stop = found[0][2:4]
    (cut,) = lm.generate_until(requests("generate_until", (QUESTIONS[0], {"until": [stop], "max_gen_toks": 8})))
    assert cut == found[0].split(stop)[0]
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "max_gen_toks": 8}
    torch.manual_seed(0)
    first, second = (lm.generate_until(requests("generate_until", (QUESTIONS[0], sampling)))[0] for _ in range(2))
    assert first and first != second


@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_every_engine_scores(harness, weights):
    """int8 weights are the lean engine's alone, and are scored as it reads them."""
    asked = pairs((QUESTIONS[0], CHOICES[0]), (QUESTIONS[1], CHOICES[2]))
    found = [score for score, _ in harness(keep_ratio=0.5, weights=weights).loglikelihood(asked)]
    plain = [score for score, _ in harness(keep_ratio=0.5, engine="transformers").loglikelihood(asked)]
    assert found == pytest.approx(plain, abs=1e-3 if weights == "stored" else 0.5)
    if weights == "int8":
        assert found != pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("mode", ["similarity", "stability", "global", "dense"])
def test_every_mode_scores(harness, index, mode):
    lm = harness(index=str(index), mode=mode, keep_ratio=0.5)
    dense = harness(mode="dense")
    asked = pairs((QUESTIONS[0], CHOICES[0]), (QUESTIONS[1], CHOICES[0]))
    found, wanted = lm.loglikelihood(asked), dense.loglikelihood(asked)
    assert (found == wanted) == (mode == "dense")
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (DOCUMENT,)))[0] < 0


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("with_document", [True, False], ids=["document", "blank line"])
def test_the_last_question_routes_whatever_examples_stand_before_it(harness, index, kind, with_document, monkeypatch):
    lm = harness(index=str(index), mode="similarity", batch_size=2)
    looked_up: list[str] = []
    lookup = SemanticIndex.lookup
    monkeypatch.setattr(
        SemanticIndex, "lookup", lambda index, texts: (looked_up.extend(texts), lookup(index, texts))[1]
    )
    shots = "".join(f"{question}{choice}\n\n" for question, choice in zip(QUESTIONS[2:], CHOICES[1:], strict=True))
    more = (CHOICES[0],) if kind == "loglikelihood" else ({"max_gen_toks": 3},)
    asked = [
        Instance(kind, {"question": question} if with_document else {}, (context, *more), number)
        for number, question in enumerate(QUESTIONS[:2])
        for context in (question, shots + question)
    ]
    getattr(lm, kind)(asked)
    assert set(looked_up) == set(QUESTIONS[:2])


def test_what_cannot_be_scored_is_refused(harness):
    with pytest.raises(ConfigError, match="mode is 'best', expected one of similarity"):
        harness(mode="best")
    with pytest.raises(ConfigError, match="score is 'best', expected one of energy"):
        harness(score="best")
    with pytest.raises(UnknownEngineError, match="no engine 'best'"):
        harness(keep_ratio=0.5, engine="best")
    with pytest.raises(ConfigError, match="rolling_prompt is 0, expected 1 or more"):
        harness(keep_ratio=0.5, rolling_prompt=0)
    with pytest.raises(PromptError, match="but the model's context is 8"):
        harness(keep_ratio=0.5, max_length=8).loglikelihood(pairs((QUESTIONS[0], DOCUMENT)))


@pytest.mark.parametrize(
    "arguments, message",
    [({}, "name no model, expected model=NAME"), ({"model": "./none", "bogus": 3}, "name bogus, which neither")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CoreInferLM.create_from_arg_obj(arguments, {"batch_size": 1, "max_batch_size": None, "device": "cpu"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_harness_s_own_device_is_no_hurdle_where_there_is_no_gpu(tiny_checkpoint, caplog):
    lm = CoreInferLM(tiny_checkpoint, mode="random", keep_ratio=0.5, device="cuda:0")
    assert lm.device.type == "cpu" and "decoding on the CPU" in caplog.text


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], lines: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}, cache_dir: {folder / 'cache'}}}\n"
        "test_split: test\n"
        'doc_to_text: "{{question}}"\n'
        f"{lines}"
        "metadata: {version: 1}\n"
    )


@pytest.fixture
def tasks(tmp_path) -> TaskManager:
    """A multiple-choice task and one that generates."""
    rows = [{"question": q, "choices": CHOICES, "answer": n % 3} for n, q in enumerate(QUESTIONS)]
    write_task(
        tmp_path,
        "tiny_choice",
        rows,
        'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )
    write_task(
        tmp_path,
        "tiny_text",
        [{"question": q, "answer": "at night"} for q in QUESTIONS],
        'output_type: generate_until\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    )
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_tasks_run_end_to_end(tiny_checkpoint, index, tasks):
    done = lm_eval.simple_evaluate(
        "coreinfer_sim",
        f"model={tiny_checkpoint},index={index},mode=similarity,keep_ratio=0.5,dtype=float32",
        tasks=["tiny_choice", "tiny_text"],
        device="cpu",
        batch_size=2,
        task_manager=tasks,
        bootstrap_iters=0,
    )
    assert 0 <= done["results"]["tiny_choice"]["acc,none"] <= 1
    assert done["results"]["tiny_text"]["exact_match,none"] == 0
    choice, text = done["samples"]["tiny_choice"], done["samples"]["tiny_text"]
    assert len(choice) == len(text) == len(QUESTIONS)
    assert all(len(sample["filtered_resps"]) == len(CHOICES) for sample in choice)
    assert all(sample["resps"][0][0] for sample in text)
