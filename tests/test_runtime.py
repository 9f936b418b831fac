"""`SparseModel.generate`: phases, batches, beams, refusals, and a model that is always put back."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import N_LAYERS, VOCABULARY, tiny_mixtral, tiny_model
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import coreinfer_sim.generation.sparse_model as runtime
from coreinfer_sim.base.errors import ConfigError, GenerationError, IndexMismatchError, UnsupportedModelError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import sentence_statistics
from coreinfer_sim.engines.compact import installed
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.models.mlps import find_mlps, weight_shape
from coreinfer_sim.models.taps import recorded_activations

N_NEW = 7
SOME = ["llama", "phi3", "opt", "gpt2", "bloom"]
"""Gated, fused, flattened, Conv1D, ALiBi: for what does not need every family."""


# --- helpers --------------------------------------------------------------------------------------------------------


class RowPredictor:
    """Gives row n of a batch the selection n."""

    mode = "rows"
    needs_text = False
    alpha = None

    def __init__(self, *selections):
        self.selections = list(selections)

    def select(self, prompts, statistics, n_rows):
        assert n_rows == len(self.selections)
        return list(self.selections)


class NotingPredictor:
    """Keeps everything, and notes by which texts it was asked."""

    mode = "noting"
    needs_text = True
    alpha = None

    def __init__(self):
        self.prompts = []

    def select(self, prompts, statistics, n_rows):
        self.prompts.append(prompts)
        return [NeuronSelection(self.mode)] * n_rows


class ListStreamer(BaseStreamer):
    def __init__(self):
        self.values, self.n_ends = [], 0

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        self.n_ends += 1


class CallAt(StoppingCriteria):
    """Calls a function once a number of tokens is there, and stops where it says so."""

    def __init__(self, n_tokens, call):
        self.n_tokens, self.call = n_tokens, call

    def __call__(self, input_ids, scores, **kwargs):
        stop = input_ids.shape[1] >= self.n_tokens and bool(self.call())
        return torch.full((len(input_ids),), stop)


class Snapshot:
    """The modules and weights of a model, to be compared with those of a later moment."""

    def __init__(self, model):
        self.model = model
        self.modules = dict(model.named_modules())
        self.weights = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}

    def check(self):
        modules = dict(self.model.named_modules())
        assert list(modules) == list(self.modules)
        assert all(modules[name] is module for name, module in self.modules.items())
        weights = self.model.state_dict(keep_vars=True)
        assert list(weights) == list(self.weights)
        for name, (tensor, value) in self.weights.items():
            assert weights[name] is tensor
            assert torch.equal(tensor, value)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())


class PhaseLog:
    """Notes of every forward pass how many positions it read, and how wide layer 0's MLP was."""

    def __init__(self, model):
        self.model, self.layers, self.passes = model, find_mlps(model), []

    def __enter__(self):
        self.hook = self.model.register_forward_hook(self._note, with_kwargs=True)
        return self.passes

    def _note(self, _module, _args, kwargs, _output):
        self.passes.append((kwargs["input_ids"].shape[1], self._width(self.layers[0].output)))

    @staticmethod
    def _width(projection):
        return weight_shape(projection)[1]

    def __exit__(self, *_):
        self.hook.remove()


def token_ids(n_rows, n_positions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (n_rows, n_positions), generator=generator)


def random_predictor(model, keep_ratio=0.4, seed=0, **options):
    return make_predictor("random", find_mlps(model), keep_ratio=keep_ratio, seed=seed, **options)


def selection(model, keep_ratio=0.4, seed=0, **options):
    return random_predictor(model, keep_ratio, seed, **options).select(None, None, 1)[0]


def everything(model):
    return random_predictor(model, keep_ratio=1.0)


def generate(target, ids, max_new_tokens=N_NEW, **options):
    """Greedy unless told otherwise; with the logits of every step."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    if isinstance(target, SparseModel):
        return target.generate(ids, max_new_tokens=max_new_tokens, **options)
    options.setdefault("attention_mask", torch.ones_like(ids))
    return target.generate(ids, max_new_tokens=max_new_tokens, **options)


def logits(output):
    """[n_rows, n_new, vocabulary]."""
    return torch.stack(output.logits, 1)


def assert_same_output(found, expected, tolerance=1e-4):
    assert torch.equal(found.sequences, expected.sequences)
    assert (logits(found) - logits(expected)).abs().max() <= tolerance


@torch.no_grad()
def by_hand(model, chosen, ids, n_new=N_NEW, cache=None):
    """Dense prefill, then one token after the other with the compact MLPs; return tokens and logits."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    steps = [model(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True).logits[:, -1]]
    with installed(find_mlps(model), chosen):
        while len(steps) < n_new:
            token = steps[-1].argmax(-1, keepdim=True)
            steps.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1])
    steps = torch.stack(steps, 1)
    return torch.cat([ids, steps.argmax(-1)], 1), steps


def left_padded(*rows):
    """Rows [1, n] of unlike lengths as one batch, and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    return ids, mask


def assert_rows_equal(batch, singles, tolerance=1e-4):
    """New tokens and logits of every row are those of the row alone."""
    n_new = len(batch.logits)
    for row, single in enumerate(singles):
        assert batch.sequences[row, -n_new:].tolist() == single.sequences[0, -n_new:].tolist()
        assert (logits(batch)[row] - logits(single)[0]).abs().max() <= tolerance


# --- phases ---------------------------------------------------------------------------------------------------------


def test_keep_ratio_one_equals_the_dense_model(model):
    ids = token_ids(2, 9)
    expected = generate(model, ids)
    assert_same_output(generate(SparseModel(model, everything(model)), ids), expected)
    assert_same_output(
        generate(SparseModel(model, make_predictor("dense", find_mlps(model)), engine="transformers"), ids),
        expected,
        0.0,
    )


def test_prefill_is_dense_and_decode_sparse(model):
    ids, chosen = token_ids(1, 9), selection(model)
    found = generate(SparseModel(model, FixedPredictor(chosen)), ids)
    dense = generate(model, ids)
    assert torch.equal(found.logits[0], dense.logits[0])  # the first new token comes out of prefill
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5
    # the second differs from dense decode only by the sparse MLPs, as the token before it is the same
    assert (found.logits[1] - dense.logits[1]).abs().max() > 1e-2


def test_phases_by_pass(models):
    model = models["llama"]
    with PhaseLog(model) as passes:
        generate(SparseModel(model, random_predictor(model, 0.5), engine="transformers"), token_ids(1, 9), 4)
    assert passes == [(9, 48), (1, 24), (1, 24), (1, 24)]


def test_one_token_prompt(model):
    """A pass over a single position is prefill all the same."""
    ids, chosen = token_ids(1, 1), selection(model)
    with PhaseLog(model) as passes:
        found = generate(SparseModel(model, FixedPredictor(chosen), engine="transformers"), ids)
    d_ff = find_mlps(model)[0].d_ff
    assert passes == [(1, d_ff)] + [(1, n_kept(0.4, d_ff))] * (N_NEW - 1)
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5


@pytest.mark.parametrize("chunk", [1, 4, 9, 20])
def test_chunked_prefill(models, chunk):
    model = models["llama"]
    ids, chosen = token_ids(1, 9), selection(model, 0.5)
    with PhaseLog(model) as passes:
        found = generate(
            SparseModel(model, FixedPredictor(chosen), engine="transformers"),
            ids,
            prefill_chunk_size=chunk,
            past_key_values=DynamicCache(config=model.config),
        )
    prefill = {1: [1] * 9, 4: [4, 4, 1], 9: [9], 20: [9]}[chunk]
    assert passes == [(n, 48) for n in prefill] + [(1, 24)] * (N_NEW - 1)
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-4


@pytest.mark.parametrize("key", SOME)
def test_the_second_turn_of_a_conversation_is_prefill_again(models, key):
    model = models[key]
    chosen = selection(model)
    sparse = SparseModel(model, FixedPredictor(chosen), engine="transformers")
    cache, by_hand_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    first = generate(sparse, token_ids(1, 6), 4, past_key_values=cache)
    tokens, steps = by_hand(model, chosen, token_ids(1, 6), 4, by_hand_cache)
    assert torch.equal(first.sequences, tokens)
    assert cache.get_seq_length() == by_hand_cache.get_seq_length() == 9

    ids = torch.cat([first.sequences, token_ids(1, 5, seed=1)], 1)
    with PhaseLog(model) as passes:
        second = generate(sparse, ids, 4, past_key_values=cache)
    d_ff = find_mlps(model)[0].d_ff
    assert passes == [(6, d_ff)] + [(1, n_kept(0.4, d_ff))] * 3  # the last token of the first turn, and the new five
    tokens, steps = by_hand(model, chosen, ids, 4, by_hand_cache)
    assert torch.equal(second.sequences, tokens)
    assert (logits(second) - steps).abs().max() <= 1e-4


def test_static_cache(models):
    for key in ("llama", "gemma2"):
        model = models[key]
        sparse = SparseModel(model, random_predictor(model))
        expected = generate(sparse, token_ids(1, 9))
        assert_same_output(generate(sparse, token_ids(1, 9), cache_implementation="static"), expected)


def test_some_layers_stay_dense(models):
    model = models["llama"]
    chosen = selection(model, sparse_layers="1:2")
    assert list(chosen.ids) == [1]
    found = generate(SparseModel(model, FixedPredictor(chosen)), token_ids(1, 9))
    tokens, steps = by_hand(model, chosen, token_ids(1, 9))
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5


def test_input_ids_by_name_and_as_a_plain_tensor(models):
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model))
    ids = token_ids(2, 5)
    plain = sparse.generate(ids, max_new_tokens=4, do_sample=False)
    assert plain.shape == (2, 9)
    by_name = sparse.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, by_name)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(plain, sparse.generate(ids, generation_config=config))


def test_bfloat16():
    model = tiny_model("llama").bfloat16()
    ids, chosen = token_ids(1, 6), selection(model)
    found = generate(SparseModel(model, FixedPredictor(chosen)), ids)
    tokens, _ = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)


# --- sampling, beams, streams, ends ---------------------------------------------------------------------------------


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


# --- batches --------------------------------------------------------------------------------------------------------


def test_left_padded_rows_of_one_selection_equal_single_rows(model):
    rows = [token_ids(1, 3, seed=1), token_ids(1, 8, seed=2), token_ids(1, 5, seed=3)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, random_predictor(model))
    assert_rows_equal(generate(sparse, ids, attention_mask=mask), [generate(sparse, row) for row in rows])


def unlike_selections(model):
    """Four rows: unlike widths, a layer that stays dense, one that twice rows share, and nothing but dense."""
    first = selection(model, 0.3, seed=1)
    return [first, selection(model, 0.6, seed=2, sparse_layers="::2"), first, NeuronSelection("dense")]


def test_left_padded_rows_of_unlike_selections_equal_single_rows(model):
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5, 6)]
    ids, mask = left_padded(*rows)
    chosen = unlike_selections(model)
    sparse = SparseModel(model, RowPredictor(*chosen))
    batch = generate(sparse, ids, attention_mask=mask)
    assert_rows_equal(
        batch, [generate(SparseModel(model, FixedPredictor(c)), r) for c, r in zip(chosen, rows, strict=True)]
    )
    assert sparse.selections == chosen


def beams_alone(model, chosen, rows, **options):
    return [
        generate(SparseModel(model, FixedPredictor(c)), row, **options) for c, row in zip(chosen, rows, strict=True)
    ]


@pytest.mark.parametrize("key", SOME)
def test_unlike_selections_with_beams_equal_single_rows(models, key):
    model = models[key]
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5, 6)]
    ids, mask = left_padded(*rows)
    chosen = unlike_selections(model)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    batch = generate(SparseModel(model, RowPredictor(*chosen)), ids, attention_mask=mask, **options)
    singles = beams_alone(model, chosen, rows, **options)
    new = torch.cat([single.sequences[:, -N_NEW:] for single in singles])
    assert torch.equal(batch.sequences[:, -N_NEW:], new)
    scores = torch.cat([single.sequences_scores for single in singles])
    torch.testing.assert_close(batch.sequences_scores, scores, atol=1e-4, rtol=1e-4)


def test_more_selections_in_a_batch_than_are_kept(models):
    model = models["llama"]
    rows = [token_ids(1, 5, seed=n) for n in range(7)]
    chosen = [selection(model, 0.2 + 0.1 * n, seed=n) for n in range(7)]
    sparse = SparseModel(model, RowPredictor(*chosen))
    singles = [generate(SparseModel(model, FixedPredictor(c)), r) for c, r in zip(chosen, rows, strict=True)]
    for _ in range(2):
        assert_rows_equal(generate(sparse, torch.cat(rows)), singles)


# --- stability ------------------------------------------------------------------------------------------------------


def stability(model, **options):
    return make_predictor("stability", find_mlps(model), **{"keep_ratio": 0.4, **options})


def prompt_core(model, ids, score, keep_ratio=0.4, alpha=0.4):
    """The core neurons of a prompt, from one dense pass."""
    found = {}
    layers = find_mlps(model)
    with recorded_activations(layers, lambda n, z: found.__setitem__(n, z.clone())) as tap, torch.no_grad():
        tap.set_mask(torch.ones_like(ids))
        model(input_ids=ids, use_cache=False)
    chosen = {}
    for number, z in found.items():
        statistics = sentence_statistics(z, [0, len(z)], alpha)
        ranked = statistics.counts if score == "paper" else statistics.energy
        chosen[number] = torch.from_numpy(top_ids(ranked[0], statistics.activation[0], n_kept(keep_ratio, z.shape[1])))
    return chosen


def assert_same_ids(found, expected):
    assert sorted(found) == sorted(expected)
    for number, ids in expected.items():
        assert found[number].tolist() == ids.tolist()


@pytest.mark.parametrize("score", ["energy", "paper"])
def test_stability_keeps_the_prompts_own_core_neurons(model, score):
    ids = token_ids(1, 9)
    sparse = SparseModel(model, stability(model, score=score))
    found = generate(sparse, ids)
    (chosen,) = sparse.selections
    assert_same_ids(chosen.ids, prompt_core(model, ids, score))
    assert sorted(chosen.ids) == list(range(N_LAYERS))
    tokens, steps = by_hand(model, chosen, ids)
    assert torch.equal(found.sequences, tokens)
    assert (logits(found) - steps).abs().max() <= 1e-5


def stability_alone(model, rows, score="energy", **options):
    outputs, selections = [], []
    for row in rows:
        sparse = SparseModel(model, stability(model, score=score))
        outputs.append(generate(sparse, row, **options))
        selections += sparse.selections
    return outputs, selections


def test_stability_by_row_equals_single_rows(model):
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, stability(model))
    batch = generate(sparse, ids, attention_mask=mask)
    singles, selections = stability_alone(model, rows)
    for found, expected in zip(sparse.selections, selections, strict=True):
        assert_same_ids(found.ids, expected.ids)
    assert_rows_equal(batch, singles)


@pytest.mark.parametrize("score", ["energy", "paper"])
@pytest.mark.parametrize("key", SOME)
def test_stability_by_row_with_beams(models, key, score):
    model = models[key]
    rows = [token_ids(1, n, seed=n) for n in (3, 8, 5)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, stability(model, score=score))
    batch = generate(sparse, ids, attention_mask=mask, num_beams=3)
    singles, selections = stability_alone(model, rows, score, num_beams=3)
    _, without_beams = stability_alone(model, rows, score)
    for found, expected, greedy in zip(sparse.selections, selections, without_beams, strict=True):
        assert_same_ids(found.ids, expected.ids)
        assert_same_ids(found.ids, greedy.ids)  # beams count a prompt's tokens once
    new = torch.cat([single.sequences[:, -N_NEW:] for single in singles])
    assert torch.equal(batch.sequences[:, -N_NEW:], new)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_stability_in_chunked_prefill(models, chunk):
    model = models["llama"]
    rows = [token_ids(1, n, seed=n) for n in (2, 8, 5)]
    ids, mask = left_padded(*rows)  # with a chunk of 3, the first row's first chunk is padding alone
    sparse = SparseModel(model, stability(model))
    cache = DynamicCache(config=model.config)
    batch = generate(sparse, ids, attention_mask=mask, prefill_chunk_size=chunk, past_key_values=cache)
    singles, selections = stability_alone(model, rows)
    for found, expected in zip(sparse.selections, selections, strict=True):
        assert_same_ids(found.ids, expected.ids)
    assert_rows_equal(batch, singles)


def test_stability_in_a_second_turn_reads_what_is_new(models):
    model = models["llama"]
    sparse = SparseModel(model, stability(model))
    cache = DynamicCache(config=model.config)
    first = generate(sparse, token_ids(1, 6), 4, past_key_values=cache)
    ids = torch.cat([first.sequences, token_ids(1, 5, seed=1)], 1)
    generate(sparse, ids, 4, past_key_values=cache)
    (chosen,) = sparse.selections

    cache = DynamicCache(config=model.config)
    generate(sparse, token_ids(1, 6), 4, past_key_values=cache)
    statistics, layers = {}, find_mlps(model)
    with recorded_activations(layers, lambda n, z: statistics.__setitem__(n, z)) as tap, torch.no_grad():
        tap.set_mask(torch.ones(1, 6))
        model(input_ids=ids[:, 9:], past_key_values=cache)
    for number, z in statistics.items():
        every = sentence_statistics(z, [0, 6], 0.4)
        expected = top_ids(every.energy[0], every.activation[0], n_kept(0.4, z.shape[1]))
        assert chosen.ids[number].tolist() == expected.tolist()


def test_stability_does_not_read_what_it_generates(models):
    """The selection is final after prefill, whatever is decoded after it."""
    model = models["llama"]
    kept = []
    for n_new in (2, 9):
        sparse = SparseModel(model, stability(model))
        generate(sparse, token_ids(1, 6), n_new)
        kept.append(sparse.selections[0].ids)
    assert_same_ids(*kept)


@pytest.mark.parametrize("key", SOME)
def test_stability_of_some_layers(models, key):
    """Layers that stay dense decode through the modules that were read during prefill; they are read no more."""
    model = models[key]
    rows = [token_ids(1, n, seed=n) for n in (3, 8)]
    ids, mask = left_padded(*rows)
    sparse = SparseModel(model, stability(model, sparse_layers="1:"))
    batch = generate(sparse, ids, attention_mask=mask)
    for number, (row, chosen) in enumerate(zip(rows, sparse.selections, strict=True)):
        core = prompt_core(model, row, "energy")
        assert_same_ids(chosen.ids, {1: core[1], 2: core[2]})
        tokens, steps = by_hand(model, chosen, row)
        for found, place in ((batch, number), (generate(sparse, row), 0)):
            assert found.sequences[place, -N_NEW:].tolist() == tokens[0, -N_NEW:].tolist()
            assert (logits(found)[place] - steps[0]).abs().max() <= 1e-4


def test_stability_with_one_new_token(models):
    model = models["llama"]
    sparse = SparseModel(model, stability(model))
    generate(sparse, token_ids(1, 9), 1)
    (chosen,) = sparse.selections
    assert_same_ids(chosen.ids, prompt_core(model, token_ids(1, 9), "energy"))


def test_guidance_is_refused(models):
    model = models["llama"]
    with pytest.raises(GenerationError, match="guidance_scale"):
        generate(SparseModel(model, stability(model)), token_ids(1, 9), guidance_scale=1.5)


# --- routing by text ------------------------------------------------------------------------------------------------


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


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache is False.*needs the cache"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache is False"),
        ({"assistant_model": object()}, "assistant_model does not go with sparse decode"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens does not go"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens does not go"),
        ({"custom_generate": "somewhere"}, "custom_generate does not go"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}, "ends in padding.*padding_side='left'"),
        ({"attention_mask": torch.ones(2, 3)}, r"shape \(2, 3\), expected that of the ids, \(2, 4\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"shape \(1, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"shape \(2, 1, 4, 4\)"),
    ],
    ids=[
        "use_cache",
        "use_cache-config",
        "assistant",
        "lookup",
        "lookup-config",
        "custom",
        "right-padding",
        "short-mask",
        "mask-of-one-row",
        "mask-4d",
    ],
)
def test_refused_options(models, options, message):
    model = models["llama"]
    before = Snapshot(model)
    sparse = SparseModel(model, random_predictor(model))
    with pytest.raises(GenerationError, match=message):
        sparse.generate(token_ids(2, 4), **{"max_new_tokens": 2, **options})
    before.check()
    assert sparse.generate(token_ids(2, 4), max_new_tokens=2).shape == (2, 6)


def test_a_model_that_is_set_to_no_cache_is_refused():
    model = tiny_model("llama")
    model.generation_config.use_cache = False
    sparse = SparseModel(model, random_predictor(model))
    with pytest.raises(GenerationError, match="use_cache is False"):
        sparse.generate(token_ids(1, 4), max_new_tokens=2)
    assert sparse.generate(token_ids(1, 4), max_new_tokens=2, use_cache=True).shape == (1, 6)


@pytest.mark.parametrize(
    "ids",
    [None, torch.zeros(1, 0, dtype=torch.long), torch.tensor([5, 6]), [[5, 6]]],
    ids=["none", "empty", "flat", "list"],
)
def test_refused_ids(models, ids):
    model = models["llama"]
    sparse = SparseModel(model, random_predictor(model))
    for call in (lambda: sparse.generate(ids), lambda: sparse.generate(input_ids=ids)):
        with pytest.raises(GenerationError, match="no token ids, expected input_ids of"):
            call()


@pytest.mark.parametrize("mode", ["random", "stability"])
def test_drafts_by_early_exit_are_refused(mode):
    model = tiny_model("llama")
    sparse = SparseModel(model, make_predictor(mode, find_mlps(model), keep_ratio=0.5))
    with pytest.raises(GenerationError, match="assistant_early_exit"):
        sparse.generate(token_ids(1, 6), max_new_tokens=6, assistant_early_exit=1, do_sample=False)


@pytest.mark.parametrize("end", [None, 3, [3, 0]], ids=["no-end", "another-end", "the-end-too"])
def test_without_a_mask_padding_is_found_as_transformers_finds_it(models, end):
    model = models["llama"]
    ids, _ = left_padded(token_ids(1, 3), token_ids(1, 7))
    options = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": end}
    found = SparseModel(model, everything(model)).generate(ids, **options)
    assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.parametrize(
    ("name", "value"), [("use_cache", False), ("prompt_lookup_num_tokens", 3), ("assistant_early_exit", 1)]
)
def test_settings_of_the_model_hold_where_a_given_config_names_none(name, value):
    model = tiny_model("llama")
    setattr(model.generation_config, name, value)
    sparse = SparseModel(model, random_predictor(model))
    with pytest.raises(GenerationError, match=name):
        sparse.generate(token_ids(1, 6), generation_config=GenerationConfig(max_new_tokens=2))


def test_padding_is_found_where_a_given_config_names_none(models):
    model = models["llama"]
    assert model.generation_config.pad_token_id == 0
    ids, _ = left_padded(token_ids(1, 3), token_ids(1, 7))
    config = GenerationConfig(max_new_tokens=N_NEW, do_sample=False)
    found = SparseModel(model, everything(model)).generate(ids, generation_config=config)
    assert torch.equal(found, model.generate(ids, generation_config=config))


def test_embeddings_in_place_of_ids(models):
    """Refused, or read as what they are: the prompt."""
    model = models["llama"]
    ids = token_ids(1, 6)
    sparse = SparseModel(model, stability(model))
    try:
        generate(sparse, ids, inputs_embeds=model.get_input_embeddings()(ids).detach())
    except GenerationError:
        return
    assert_same_ids(sparse.selections[0].ids, prompt_core(model, ids, "energy"))


def test_unsupported_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        SparseModel(tiny_mixtral(), FixedPredictor(NeuronSelection("dense")))


def test_a_selection_that_does_not_fit_is_refused(models):
    model = models["llama"]
    before = Snapshot(model)
    sparse = SparseModel(model, FixedPredictor(NeuronSelection("test", {0: torch.tensor([48])})))
    with pytest.raises(IndexMismatchError, match="layer 0 .*0 to 47"):
        generate(sparse, token_ids(1, 4))
    before.check()


def test_a_second_call_while_one_runs_is_refused(models):
    """From another thread, from within, and through another wrapper of the same model."""
    model = models["llama"]
    sparse, other = (SparseModel(model, random_predictor(model)) for _ in range(2))
    errors = []

    def call(wrapper):
        try:
            wrapper.generate(token_ids(1, 3), max_new_tokens=2)
        except GenerationError as error:
            errors.append(str(error))

    def try_all():
        for wrapper in (sparse, other):
            call(wrapper)
            thread = threading.Thread(target=call, args=(wrapper,))
            thread.start()
            thread.join()

    expected = generate(sparse, token_ids(1, 6))
    once = iter([True])
    criteria = StoppingCriteriaList([CallAt(8, lambda: next(once, None) and try_all())])
    assert_same_output(generate(sparse, token_ids(1, 6), stopping_criteria=criteria), expected, 0.0)
    assert len(errors) == 4
    assert all("is generating already" in error for error in errors)
    assert_same_output(generate(other, token_ids(1, 6)), expected, 0.0)  # and free again


# --- the model is put back ------------------------------------------------------------------------------------------


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


# --- compact weights that are kept ----------------------------------------------------------------------------------


@pytest.fixture
def cuts(monkeypatch):
    """The selections that were cut, in turn."""
    done = []
    cut = runtime.compact_model

    def noting(layers, chosen):
        done.append(chosen.label)
        return cut(layers, chosen)

    monkeypatch.setattr(runtime, "compact_model", noting)
    return done


def labelled(model, label):
    return NeuronSelection("test", selection(model, seed=ord(label)).ids, label=label)


def test_recent_selections_are_kept_up_to_a_number_of_bytes(models, cuts):
    model = models["llama"]
    named = {label: labelled(model, label) for label in "abcde"}
    one = named["a"].mlp_bytes(find_mlps(model))
    sparse = SparseModel(model, FixedPredictor(named["a"]), engine="transformers", cache_bytes=4 * one)

    def use(labels):
        cuts.clear()
        for label in labels:
            sparse.predictor = FixedPredictor(named[label])
            generate(sparse, token_ids(1, 3), 2)
        return "".join(cuts)

    assert use("aaa") == "a"
    assert use("bcd") == "bcd"
    assert use("abcd") == ""
    assert use("e") == "e"  # and "a", the oldest, goes
    assert use("bcde") == ""
    assert use("a") == "a"
    assert use("dcea") == ""
    assert use("b") == "b"  # and "d", used longest ago, goes
    assert use("ceab") == ""
    assert use("d") == "d"
    sparse.close()
    assert use("b") == "b"


def test_one_selection_is_kept_however_large(models, cuts):
    model = models["llama"]
    sparse = SparseModel(model, FixedPredictor(labelled(model, "a")), engine="transformers", cache_bytes=1)
    for _ in range(2):
        generate(sparse, token_ids(1, 3), 2)
    assert cuts == ["a"]


def test_a_dense_prompt_cuts_nothing_twice(models, cuts):
    model = models["llama"]
    rows = RowPredictor(labelled(model, "x"), labelled(model, "y"), labelled(model, "z"))
    sparse = SparseModel(model, rows, engine="transformers")
    generate(sparse, token_ids(3, 4), 2)
    generate(sparse, token_ids(3, 4), 2)
    assert cuts == ["x", "y", "z"]


def test_selections_that_share_their_ids_share_a_group(models, cuts):
    """As those of prompts of one cluster do: one group, and so no grouping."""
    model = models["llama"]
    ids = selection(model).ids
    rows = RowPredictor(NeuronSelection("test", ids, label="p"), NeuronSelection("test", ids, label="q"))
    with PhaseLog(model) as passes:
        generate(SparseModel(model, rows, engine="transformers"), token_ids(2, 4), 2)
    assert cuts == ["p"]
    assert passes == [(4, 48), (1, n_kept(0.4, 48))]


def test_shared_ids_beside_others(models):
    model = models["llama"]
    shared, other = selection(model, 0.3, seed=1), selection(model, 0.6, seed=2)
    rows = [token_ids(1, 5, seed=n) for n in range(4)]
    chosen = [NeuronSelection("test", each.ids, cluster=n) for n, each in enumerate((shared, other, shared, other))]
    singles = [generate(SparseModel(model, FixedPredictor(c)), r) for c, r in zip(chosen, rows, strict=True)]
    assert_rows_equal(generate(SparseModel(model, RowPredictor(*chosen)), torch.cat(rows)), singles)


def test_leaving_the_block_lets_go_of_the_compact_weights(models, cuts):
    model = models["llama"]
    before = Snapshot(model)
    with SparseModel(model, FixedPredictor(labelled(model, "a")), engine="transformers") as sparse:
        generate(sparse, token_ids(1, 3), 2)
    generate(sparse, token_ids(1, 3), 2)
    assert cuts == ["a", "a"]
    before.check()


# --- predictors without an index ------------------------------------------------------------------------------------


def test_random_selection_is_reproducible(models):
    model = models["llama"]
    once, again, other = (selection(model, 0.5, seed=seed) for seed in (1, 1, 2))
    assert once.mode == "random"
    assert_same_ids(once.ids, again.ids)
    assert any(once.ids[n].tolist() != other.ids[n].tolist() for n in range(N_LAYERS))
    for ids in once.ids.values():
        assert len(ids) == 24
        assert (ids.diff() > 0).all()
    assert once.ids[0].tolist() != once.ids[1].tolist()


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("random", {}, "no keep ratio"),
        ("stability", {}, "no keep ratio"),
        ("random", {"keep_ratio": 0.0}, "keep ratio is 0.0"),
        ("stability", {"keep_ratio": 1.5}, "keep ratio is 1.5"),
        ("random", {"keep_ratio": 0.5, "sparse_layers": "3:"}, "names none of the model's 3 layers"),
        ("similarity", {"keep_ratio": 0.5}, "needs an index"),
        ("hybrid", {"keep_ratio": 0.5}, "needs an index"),
        ("global", {"keep_ratio": 0.5}, "needs an index"),
    ],
)
def test_refused_settings(models, mode, options, message):
    with pytest.raises(ConfigError, match=message):
        make_predictor(mode, find_mlps(models["llama"]), **options)


def test_stability_ranks_by_what_it_is_told(models):
    model = models["llama"]
    ids = token_ids(1, 9)
    chosen = {score: prompt_core(model, ids, score, 0.3) for score in ("energy", "paper")}
    assert any(chosen["energy"][n].tolist() != chosen["paper"][n].tolist() for n in range(N_LAYERS))
    for score, expected in chosen.items():
        sparse = SparseModel(model, stability(model, keep_ratio=0.3, score=score))
        generate(sparse, ids)
        assert_same_ids(sparse.selections[0].ids, expected)
