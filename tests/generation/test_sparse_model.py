"""`SparseModel.generate`: sampling, beams, streams, routing by text, and a model that is always put back."""

from __future__ import annotations

import pytest
import torch
from calls import (
    N_NEW,
    CallAt,
    ListStreamer,
    NotingPredictor,
    RowPredictor,
    Snapshot,
    assert_same_output,
    everything,
    generate,
    left_padded,
    random_predictor,
    selection,
    stability,
    token_ids,
    unlike_selections,
)
from transformers import DynamicCache, StoppingCriteriaList

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.structure import weight_shape


def test_sampling_with_a_seed_equals_dense_sampling(model):
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "num_return_sequences": 2}
    ids = token_ids(2, 6)
    outputs = []
    for target in (model, SparseModel(model, everything(model))):
        torch.manual_seed(3)
        outputs.append(generate(target, ids, **options))
    assert_same_output(outputs[1], outputs[0])
    torch.manual_seed(4)
    other = generate(SparseModel(model, everything(model)), ids, **options)
    assert not torch.equal(other.sequences, outputs[0].sequences)


def test_beams_at_keep_ratio_one_equal_transformers(model):
    ids = token_ids(2, 6)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    expected = generate(model, ids, **options)
    found = generate(SparseModel(model, everything(model)), ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


def test_num_return_sequences_come_row_by_row(models):
    model = models["llama"]
    rows = [token_ids(1, 6, seed=1), token_ids(1, 6, seed=2)]
    chosen = [selection(model, 0.3, seed=1), selection(model, 0.5, seed=2)]
    torch.manual_seed(0)
    batch = generate(SparseModel(model, RowPredictor(*chosen)), torch.cat(rows), do_sample=True, num_return_sequences=3)
    assert batch.sequences.shape == (6, 6 + N_NEW)
    assert len({tuple(tokens) for tokens in batch.sequences.tolist()}) == 6
    for row in range(6):  # what was drawn, read again with the row's own selection
        tokens = batch.sequences[row : row + 1]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=tokens[:, :6], past_key_values=cache)
            with installed(find_mlps(model), chosen[row // 3]):
                for step in range(1, N_NEW):
                    out = model(input_ids=tokens[:, 5 + step : 6 + step], past_key_values=cache)
                    assert (out.logits[0, -1] - batch.logits[step][row]).abs().max() <= 1e-4


def test_streamer_sees_the_prompt_and_every_token(models):
    model = models["llama"]
    streamer, ids = ListStreamer(), token_ids(1, 6)
    found = generate(SparseModel(model, random_predictor(model)), ids, streamer=streamer)
    tokens = found.sequences[0].tolist()
    assert streamer.values == [tokens[:6], *([token] for token in tokens[6:])]
    assert streamer.n_ends == 1


def test_stopping_criteria(models):
    model = models["llama"]
    criteria = StoppingCriteriaList([CallAt(9, lambda: True)])
    whole = generate(SparseModel(model, random_predictor(model)), token_ids(1, 6))
    stopped = generate(SparseModel(model, random_predictor(model)), token_ids(1, 6), stopping_criteria=criteria)
    assert stopped.sequences.tolist() == whole.sequences[:, :9].tolist()


def test_end_token(models):
    model = models["gpt-neox"]
    rows = [token_ids(1, 4, seed=1), token_ids(1, 6, seed=4)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, random_predictor(model))
    free = generate(sparse, ids, attention_mask=mask).sequences[:, 6:]
    end = free[0, 3].item()
    expected = []
    for tokens in free.tolist():
        cut = tokens.index(end) + 1 if end in tokens else N_NEW
        expected.append(tokens[:cut] + [0] * (N_NEW - cut))
    ended = generate(sparse, ids, attention_mask=mask, eos_token_id=end, pad_token_id=0).sequences[:, 6:]
    assert ended.tolist() == [tokens[: ended.shape[1]] for tokens in expected]
    assert 0 in ended[0].tolist() or ended.shape[1] < N_NEW
    alone = generate(sparse, rows[0], eos_token_id=end, pad_token_id=0).sequences[0, 4:].tolist()
    assert alone == free[0].tolist()[: alone.index(end) + 1]
    assert len(alone) < N_NEW


class Letters:
    """A tokenizer that shows which ids it was given."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(number) for number in ids.tolist())


def test_prompts_are_decoded_without_padding(models):
    predictor = NotingPredictor()
    ids, mask = left_padded(torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9, 10]]))
    generate(SparseModel(models["llama"], predictor, Letters()), ids, 2, attention_mask=mask)
    assert predictor.prompts == [["5 6", "7 8 9 10"]]


def test_prompts_that_are_given_are_taken(models):
    predictor = NotingPredictor()
    generate(SparseModel(models["llama"], predictor), token_ids(2, 3), 2, prompts=["one", "two"])
    assert predictor.prompts == [["one", "two"]]


def test_prompts_must_be_one_a_row(models):
    with pytest.raises(GenerationError, match="1 prompts were given for 2 rows"):
        generate(SparseModel(models["llama"], NotingPredictor()), token_ids(2, 3), 2, prompts=["one"])


def test_routing_by_text_needs_a_tokenizer(models):
    with pytest.raises(GenerationError, match="give the wrapper a tokenizer"):
        generate(SparseModel(models["llama"], NotingPredictor()), token_ids(1, 3), 2)


def test_the_model_is_restored(model):
    before = Snapshot(model)
    dense = generate(model, token_ids(2, 6))
    for predictor in (random_predictor(model), stability(model), RowPredictor(*unlike_selections(model)[:2])):
        generate(SparseModel(model, predictor), token_ids(2, 6))
        before.check()
    assert_same_output(generate(model, token_ids(2, 6)), dense, 0.0)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [7, 9], ids=["after-prefill", "during-decode"])
def test_the_model_is_restored_after_an_exception(model, error, when):
    before = Snapshot(model)
    widths = []

    def fail():
        widths.append(weight_shape(find_output(model))[1])
        raise error

    criteria = StoppingCriteriaList([CallAt(when, fail)])
    for predictor in (random_predictor(model), stability(model)):
        sparse = SparseModel(model, predictor, engine="transformers")
        with pytest.raises(error):
            generate(sparse, token_ids(1, 6), stopping_criteria=criteria)
        before.check()
        assert len(generate(sparse, token_ids(1, 6)).logits) == N_NEW  # nothing is locked
    d_ff = find_mlps(model)[0].d_ff
    assert widths == [d_ff if when == 7 else n_kept(0.4, d_ff)] * 2


def find_output(model):
    """Layer 0's output projection as it is now, compact or not."""
    owner = next(
        m for m in model.modules() if type(m).__name__ in {"OPTDecoderLayer"} or type(m).__name__.endswith("MLP")
    )
    return next(
        getattr(owner, name) for name in ("down_proj", "fc2", "c_proj", "dense_4h_to_h") if hasattr(owner, name)
    )


def test_the_model_is_restored_after_a_predictor_fails(models):
    model = models["llama"]
    before = Snapshot(model)

    class Failing:
        mode, needs_text = "failing", False

        def __init__(self, alpha):
            self.alpha = alpha

        def select(self, prompts, statistics, n_rows):
            if self.alpha is not None and statistics is None:
                return None
            raise ZeroDivisionError

    for alpha in (None, 0.4):  # before prefill, and after it
        sparse = SparseModel(model, Failing(alpha))
        with pytest.raises(ZeroDivisionError):
            generate(sparse, token_ids(1, 6))
        before.check()
        sparse.predictor = random_predictor(model)
        generate(sparse, token_ids(1, 6))


def test_options_that_transformers_refuses_leave_the_model_dense(models):
    model = models["llama"]
    before = Snapshot(model)
    for predictor in (random_predictor(model), stability(model)):
        with pytest.raises(ValueError, match="no_such_option"):
            generate(SparseModel(model, predictor), token_ids(1, 6), no_such_option=1)
        before.check()
