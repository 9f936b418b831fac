"""Calls of generate that tests compare, and what they look at."""

from __future__ import annotations

import torch
from tiny_models import VOCABULARY
from transformers import DynamicCache
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import activation_statistics
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept, top_ids
from coreinfer_sim.models.mlps import find_mlps
from coreinfer_sim.models.structure import weight_shape
from coreinfer_sim.models.taps import recorded_activations

N_NEW = 7
SOME = ["llama", "phi3", "opt", "gpt2", "bloom"]
"""Gated, fused, flattened, Conv1D, ALiBi: for what does not need every family."""


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


def unlike_selections(model):
    """Four rows: unlike widths, a layer that stays dense, one that twice rows share, and nothing but dense."""
    first = selection(model, 0.3, seed=1)
    return [first, selection(model, 0.6, seed=2, sparse_layers="::2"), first, NeuronSelection("dense")]


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
        statistics = activation_statistics(z, [0, len(z)], alpha)
        ranked = statistics.counts if score == "paper" else statistics.energy
        chosen[number] = torch.from_numpy(top_ids(ranked[0], statistics.activation[0], n_kept(keep_ratio, z.shape[1])))
    return chosen


def assert_same_ids(found, expected):
    assert sorted(found) == sorted(expected)
    for number, ids in expected.items():
        assert found[number].tolist() == ids.tolist()
