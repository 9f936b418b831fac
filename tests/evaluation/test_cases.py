"""One row under forced decode: the scores of decoding token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scored import ROWS

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.predictors import FixedPredictor, random_selection
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.evaluation.cases import Case
from coreinfer_sim.evaluation.rows import joined
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import dense_bytes


@pytest.fixture(scope="module", params=["lean", "transformers"])
def engine(request, language_model):
    """Each engine in turn."""
    (made,), _ = choose_engines(language_model.model, language_model.layers, DecodeConfig(engine=request.param))
    yield made
    made.close()


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
def test_scores_are_those_of_decoding_token_by_token(language_model, engine, keep_ratio):
    n_layers = len(language_model.layers)
    selection = random_selection(language_model.layers, range(n_layers), keep_ratio, seed=1)
    case = Case(language_model, engine, ROWS[0], 256, 0.4)
    (held,) = engine.prepare([selection])
    score = case.score(held)
    loss, n_tokens = stepwise_loss(language_model, ROWS[0], selection)
    assert score.n_tokens == n_tokens
    assert score.loss == pytest.approx(loss, abs=1e-3)
    assert score.mlp_bytes == pytest.approx(keep_ratio * dense_bytes(language_model.layers), rel=0.05)
    assert score.total_bytes == score.mlp_bytes + engine.other_bytes()
    if keep_ratio == 1.0:
        assert score.loss == pytest.approx(case.reference_loss, abs=1e-3)
        assert score.kl == pytest.approx(0, abs=1e-4)
        assert score.n_same_top == n_tokens
    else:
        assert score.kl > 1e-3


def test_sparse_prefill_scores_a_model_that_is_sparse_throughout(language_model, engine):
    selection = random_selection(language_model.layers, range(len(language_model.layers)), 0.5, seed=1)
    case = Case(language_model, engine, ROWS[0], 256, 0.4)
    (held,) = engine.prepare([selection])
    before = case.score(held)
    with case.read_sparsely(held):
        sparse = case.score(held)
    assert case.score(held) == before != sparse
    with installed(language_model.layers, selection):
        prompt, completion = joined(ROWS[0].prompt, ROWS[0].completion)
        ids, new = (language_model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion))
        with torch.no_grad():
            logits = language_model.model(torch.tensor([ids + new])).logits[0, len(ids) : -1]
    assert sparse.loss == pytest.approx(
        F.cross_entropy(logits, torch.tensor(new[1:]), reduction="sum").item(), abs=1e-3
    )


def test_the_first_token_of_a_completion_is_dense_and_not_scored(language_model, engine):
    with pytest.raises(CorpusError, match="expected at least 1 and 2"):
        Case(language_model, engine, Row("1", "What do cats do?", completion="a", set_name="things"), 256, 0.4)


def test_statistics_of_the_prompt_and_of_the_completion(language_model, engine):
    case = Case(language_model, engine, ROWS[0], 256, 0.4)
    oracle = case.oracle_statistics()
    assert set(case.statistics) == set(oracle) == set(range(len(language_model.layers)))
    n_prompt = len(language_model.tokenizer(joined(ROWS[0].prompt, ROWS[0].completion)[0])["input_ids"])
    n_new = len(language_model.tokenizer(ROWS[0].completion, add_special_tokens=False)["input_ids"])
    assert case.statistics[0].energy.sum() == pytest.approx(n_prompt, rel=1e-3)  # each token's energies sum to one
    assert oracle[0].energy.sum() == pytest.approx(n_new - 1, rel=1e-3)


@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_a_generated_text_is_that_of_sparse_decode(language_model, engine, keep_ratio):
    selection = random_selection(language_model.layers, range(len(language_model.layers)), keep_ratio, seed=1)
    case = Case(language_model, engine, ROWS[0], 256, 0.4)
    first, text, again = (case.generate(selection, n) for n in (1, 12, 12))
    prompt, _ = joined(ROWS[0].prompt, ROWS[0].completion)
    ids = language_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = SparseModel(language_model.model, FixedPredictor(selection), config=engine.config).generate(
        ids, do_sample=False, max_new_tokens=12
    )
    assert text == again == language_model.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    dense = case.generate(NeuronSelection("dense"), 12)
    assert (text == dense) == (keep_ratio == 1.0)
    assert first == case.generate(NeuronSelection("dense"), 1) and text.startswith(
        first
    )  # the first token is the dense prefill's


def test_a_generated_text_ends_at_an_end_token(language_model, engine, monkeypatch):
    case = Case(language_model, engine, ROWS[0], 256, 0.4)
    dense = NeuronSelection("dense")
    prompt, _ = joined(ROWS[0].prompt, ROWS[0].completion)
    ids = language_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    first = int(language_model.model(ids).logits[0, -1].argmax())
    assert case.generate(dense, 12).startswith(case.generate(dense, 1)) and len(case.generate(dense, 12)) > 1
    for ends in ([first], first):
        monkeypatch.setattr(language_model.model.generation_config, "eos_token_id", ends)
        assert Case(language_model, engine, ROWS[0], 256, 0.4).generate(dense, 12) == case.generate(dense, 1)


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


def test_a_long_prompt_keeps_the_token_that_stands_before_every_text(language_model, engine):
    tokenizer = language_model.tokenizer
    row = Row("1", "one two three four " * 20, completion="five six seven", set_name="long")
    plain = Case(language_model, engine, row, 16, 0.4).prompt_ids[0].tolist()
    ids = tokenizer(joined(row.prompt, row.completion)[0])["input_ids"]
    assert plain == ids[-8:]
    begins = dataclasses.replace(language_model, tokenizer=WithBeginning(tokenizer))
    cut = Case(begins, engine, row, 16, 0.4).prompt_ids[0].tolist()
    assert cut == [WithBeginning.bos_token_id, *ids[-7:]]
