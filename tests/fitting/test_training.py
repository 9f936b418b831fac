"""Training learns what the dense model predicts, and goes on where it was broken off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compensation_cases import divergence, fitted_blankly, language_model_of, some_texts
from tiny_models import N_LAYERS, STRUCTURES

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.engines.cutting import compact_model
from coreinfer_sim.fitting import reading, training
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.layerwise import Fit, fit_layers
from coreinfer_sim.fitting.reading import read_densely
from coreinfer_sim.fitting.student import Distillation
from coreinfer_sim.fitting.training import distil, divergences_of, n_decoded, sound_gradients, training_on
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import linear_parameters


def test_distillation_learns_in_every_family(model):
    language_model = language_model_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = some_texts(30)
    fitted = fit_layers(language_model, texts, [language_model.layers[0].d_ff // 2] * N_LAYERS, Fit())
    blank = {n: replace(c, delta=0 * c.delta, bias=0 * c.bias) for n, c in fitted.compensation.items()}
    fitted = replace(fitted, compensation=blank)  # a tiny model's closed form leaves little to learn
    reported = []
    weight = linear_parameters(language_model.layers[0].output)[0]
    rate = 3e-3 / float(weight.square().mean().sqrt())  # tiny models' weights are smaller than what there is to learn
    settings = Distillation(learning_rate=rate, rate_of_change=None, tokens_per_step=200)
    ((distilled,),) = distil(language_model, [[fitted]], texts * 3, [0] * 90, settings, reported.append)
    assert divergence(model, texts, distilled) < 0.9 * divergence(model, texts, fitted)
    assert sum(reported) == 3 * sum(len(text.ids) for text in texts)
    assert distilled.ids is fitted.ids
    for number, repair in distilled.compensation.items():
        was = fitted.compensation[number]
        assert (repair.bias.shape, repair.delta.shape) == (was.bias.shape, was.delta.shape)
        assert not repair.bias.requires_grad and not repair.delta.requires_grad
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_sets_that_are_trained_together_learn_what_each_would_alone(tiny_checkpoint):
    language_model = load_model(tiny_checkpoint, dtype="float32")
    texts, d_ff = some_texts(20), language_model.layers[0].d_ff
    starts = [fit_layers(language_model, texts, [n] * N_LAYERS, Fit()) for n in (d_ff // 2, d_ff // 4)]
    reported = []
    together = distil(language_model, [[start] for start in starts], texts, [0] * 20, Distillation(), reported.append)
    assert sum(reported) == sum(len(text.ids) for text in texts)  # read once for both
    for start, (found,) in zip(starts, together, strict=True):
        ((alone,),) = distil(language_model, [[start]], texts, [0] * 20, Distillation())
        for number, repair in alone.compensation.items():
            assert torch.equal(repair.delta, found.compensation[number].delta)
            assert not torch.equal(repair.delta, start.compensation[number].delta)


def test_training_moves_weights_by_what_the_fit_moved_them(tiny_checkpoint):
    language_model = load_model(tiny_checkpoint, dtype="float32")
    texts, d_ff = some_texts(20), language_model.layers[0].d_ff
    fitted = fit_layers(language_model, texts, [d_ff // 2] * N_LAYERS, Fit())

    def moved(share, settings):
        """How far training moves a layer's weights, over how far a fit did that is ``share`` of the true one."""
        small = {n: replace(c, delta=share * c.delta) for n, c in fitted.compensation.items()}
        start = replace(fitted, compensation=small)
        ((found,),) = distil(language_model, [[start]], texts, [0] * len(texts), settings)
        steps = [found.compensation[n].delta - small[n].delta for n in range(N_LAYERS)]
        return [float(step.norm() / small[n].delta.norm()) for n, step in enumerate(steps)]

    settings = Distillation(tokens_per_step=1)
    most = settings.rate_of_change * len(texts)  # one text a step, all steps in one direction
    for share in (1e-3, 1e-4):
        assert all(0.1 * most < each <= most for each in moved(share, settings))
        assert min(moved(share, replace(settings, rate_of_change=None))) > 2 * most
    unbound = moved(1e3, replace(settings, rate_of_change=None))
    assert moved(1e3, settings) == unbound  # the rate that goes by the weights is the most


@pytest.mark.parametrize("key", STRUCTURES)
def test_sets_that_learn_jointly_share_what_they_learn_in_every_structure(key, models):
    model = models[key]
    language_model, texts = language_model_of(model), some_texts(30)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blank, settings = fitted_blankly(language_model, texts, 2)
    reported = []
    (trained,) = distil(language_model, [blank], texts * 3, [i % 2 for i in range(30)] * 3, settings, reported.append)
    assert sum(reported) == 3 * sum(len(text.ids) for text in texts)
    for number, (was, found) in enumerate(zip(blank, trained, strict=True)):
        assert divergence(model, texts[number::2], found) < 0.95 * divergence(model, texts[number::2], was)
    for number in range(N_LAYERS):
        ids, other_ids = (each.ids[number] for each in trained)
        shared, places, other_places = np.intersect1d(ids, other_ids, return_indices=True)
        own, other = (each.compensation[number] for each in trained)
        assert 0 < len(shared) < len(ids) and torch.equal(own.bias, other.bias)
        assert torch.equal(own.delta[:, places], other.delta[:, other_places])
        assert not own.delta.requires_grad and own.delta.abs().sum() > 0
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("joint", [False, True], ids=["one reader", "two"])
def test_training_on_packs_learns_what_it_does_one_by_one(models, monkeypatch, joint):
    language_model, texts = language_model_of(models["llama"]), some_texts(20)
    sets, settings = fitted_blankly(language_model, texts, 2)
    settings = replace(settings, tokens_per_step=100_000)  # a step for each reader

    def train(most):
        monkeypatch.setattr(reading, "TOKENS_AT_ONCE", {"cpu": most})
        if not joint:
            return [
                trained for (trained,) in distil(language_model, [[each] for each in sets], texts, [0] * 20, settings)
            ]
        return distil(language_model, [sets], texts, [i % 2 for i in range(20)], settings)[0]

    for one, several in zip(train(0), train(100), strict=True):
        for number in range(N_LAYERS):
            change, other = one.compensation[number].delta, several.compensation[number].delta
            assert change.abs().sum() > 0
            assert float((change - other).abs().mean()) < 0.02 * float(change.abs().mean())


@pytest.mark.parametrize("joint", [False, True], ids=["one reader", "two"])
def test_training_that_is_broken_off_ends_as_it_would_have(models, tmp_path, monkeypatch, joint):
    monkeypatch.setattr(training, "KEPT_EVERY", 0.0)
    language_model, texts = language_model_of(models["llama"]), some_texts(20)
    sets, settings = fitted_blankly(language_model, texts, 2)
    settings = replace(settings, tokens_per_step=50)
    path, left = tmp_path / "training" / "1.safetensors", []

    def train(checkpoint, report=None):
        families, readers = ([sets], [0, 1] * 10) if joint else ([[each] for each in sets], [0] * 20)
        found = distil(language_model, families, texts, readers, settings, report, checkpoint)
        return [selection for family in found for selection in family]

    def interrupted(n_tokens):
        left.append(n_tokens)
        if len(left) == 5:
            raise KeyboardInterrupt

    def counted(*arguments):
        n_read.append(len(arguments[1]))
        return read_densely(*arguments)

    n_read = []
    monkeypatch.setattr(training, "read_densely", counted)
    wanted = train(None)
    assert sum(n_read) == len(texts)
    with pytest.raises(KeyboardInterrupt):
        train(path, interrupted)
    n_read.clear()
    assert path.exists() and all(p.requires_grad for p in language_model.model.parameters())
    reported = []
    found = train(path, reported.append)
    assert sum(reported) == sum(len(text.ids) for text in texts) and len(reported) < len(texts)  # steps at a time
    assert 0 < sum(n_read) < len(texts)  # what was done is not read again
    for one, two in zip(wanted, found, strict=True):
        assert all(torch.equal(one.compensation[n].delta, two.compensation[n].delta) for n in range(N_LAYERS))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BuildError, match="cannot be read"):
        train(path)


def test_divergences_of_packs_are_those_of_texts_one_by_one(models, monkeypatch):
    language_model, texts = language_model_of(models["llama"]), some_texts(20)
    sets, _ = fitted_blankly(language_model, texts, 2)
    compact = [compact_model(language_model.layers, each) for each in sets]
    reported = []
    together = divergences_of(language_model, texts, compact, reported.append)
    assert sum(reported) == 20 > len(reported)
    monkeypatch.setattr(reading, "TOKENS_AT_ONCE", {"cpu": 0})
    alone = divergences_of(language_model, texts, compact, lambda _n: None)
    assert np.min(alone) > 0
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_steps_are_larger_on_a_gpu_where_there_are_enough(monkeypatch):
    texts = some_texts(20)
    n_tokens = sum(n_decoded(text) for text in texts)
    assert training_on("cpu", texts) == training_on("cuda", texts) == Distillation()
    monkeypatch.setattr(training, "ENOUGH_STEPS", 2)
    large = training_on("cuda", texts)
    assert large.tokens_per_step == min(1000, n_tokens // 2) > Distillation.tokens_per_step


def test_training_stops_at_gradients_that_are_no_numbers(models):
    language_model, texts = language_model_of(models["llama"]), some_texts(4)
    (start, _), settings = fitted_blankly(language_model, texts, 2)
    repair = start.compensation[0]
    broken = replace(start, compensation={**start.compensation, 0: replace(repair, bias=repair.bias * float("inf"))})
    with pytest.raises(BuildError, match="step 1 of 1 is nan, expected a finite one"):
        distil(language_model, [[broken]], texts, [0] * 4, replace(settings, tokens_per_step=100_000))


def test_short_completions_leave_the_prompts_end_to_be_read_sparsely():
    assert n_decoded(CalibrationText(list(range(100)), 60)) == 40
    assert n_decoded(CalibrationText(list(range(100)), 97)) == 32
    assert n_decoded(CalibrationText(list(range(20)), 18)) == 19
    assert n_decoded(CalibrationText([1], 0)) == 0


def test_training_on_a_gpu_does_without_cudnn_attention():
    was = torch.backends.cuda.cudnn_sdp_enabled()
    with sound_gradients("cuda"):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    with sound_gradients("cpu"):
        assert torch.backends.cuda.cudnn_sdp_enabled() == was
