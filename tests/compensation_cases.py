"""Small cases of compensation that several rooms test with: texts, moments, blank sets, and what a set costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tiny_models import VOCABULARY

from coreinfer_sim.base.settings import CompensationConfig
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.layerwise import Fit, fit_layers
from coreinfer_sim.fitting.least_squares import Moments
from coreinfer_sim.fitting.student import Distillation
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import find_mlps, linear_parameters

COMPENSATION = CompensationConfig(keep_ratios=(0.5, 0.7), tokens=300, distil_tokens=200)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(features, targets, weights=None):
    moments = Moments(features.shape[1], targets.shape[1])
    weights = torch.ones(len(features)) if weights is None else weights
    for part in range(0, len(features), 100):
        rows = slice(part, part + 100)
        moments.add(features[rows], targets[rows], weights[rows])
    return moments


def language_model_of(model):
    return LanguageModel(model, None, "tiny", find_mlps(model))


def some_texts(n=12, seed=0):
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        length = int(random.integers(12, 60))
        texts.append(
            CalibrationText(random.integers(4, VOCABULARY, length).tolist(), int(random.integers(1, length - 4)))
        )
    return texts


@torch.inference_mode()
def divergence(model, texts, selection):
    """Mean KL to the dense model after the prompts, which are read densely."""
    total = n = 0
    for text in texts:
        ids = torch.tensor([text.ids])
        dense = model(ids, use_cache=False).logits[0, text.n_prompt :].log_softmax(-1)
        cache = model(ids[:, : text.n_prompt], use_cache=True).past_key_values
        with installed(find_mlps(model), selection):
            own = model(ids[:, text.n_prompt :], past_key_values=cache, use_cache=True).logits[0].log_softmax(-1)
        total += (dense.exp() * (dense - own)).sum().item()
        n += len(dense)
    return total / n


def fitted_blankly(language_model, texts, n_sets):
    """Sets of different neurons whose compensation adds nothing yet, and a rate that suits so small a model."""
    layers = language_model.layers
    n_kept = [layer.d_ff // 2 for layer in layers]
    fitted = [fit_layers(language_model, texts[i::n_sets], n_kept, Fit()) for i in range(n_sets)]
    blank = [
        replace(
            each, compensation={n: replace(c, delta=0 * c.delta, bias=0 * c.bias) for n, c in each.compensation.items()}
        )
        for each in fitted
    ]
    rate = 3e-3 / float(linear_parameters(layers[0].output)[0].square().mean().sqrt())
    return blank, Distillation(learning_rate=rate, rate_of_change=None, tokens_per_step=200)
