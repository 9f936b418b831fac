"""Packs of texts are read as the texts one by one."""

from __future__ import annotations

import torch
from compensation_cases import some_texts

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.fitting import reading
from coreinfer_sim.fitting.clustered_corpus import CalibrationText
from coreinfer_sim.fitting.reading import packs, read_densely
from coreinfer_sim.fitting.training import n_decoded
from coreinfer_sim.models.mlps import find_mlps


def test_texts_of_a_pack_and_filling_are_read_as_one_by_one_in_every_family(model, monkeypatch):
    texts = some_texts(7)
    n_last = [n_decoded(text) // (1 + i % 3) for i, text in enumerate(texts)]
    assert len(set(n_last)) > 3 and len({len(text.ids) for text in texts}) > 3
    if len(list(packs(model, texts))) > 1:
        assert model.config.model_type == "bloom" or model.config.sliding_window < 20  # such texts go one by one
        assert list(packs(model, texts)) == [[i] for i in range(7)]
        return
    together = read_densely(model, texts, n_last)
    assert (len(together.ids) % 32, len(together.seen) % 32) == (0, 0)
    monkeypatch.setattr(reading, "LENGTH_STEP", 1)
    alone = [read_densely(model, [text], [n]) for text, n in zip(texts, n_last, strict=True)]
    wanted = torch.cat([each.log_probabilities for each in alone])
    assert together.n_last == len(wanted) == sum(n_last) < len(together.ids)
    assert torch.allclose(together.log_probabilities[: len(wanted)], wanted, atol=1e-4)
    layers = find_mlps(model)
    half = NeuronSelection("half", {layer.number: torch.arange(layer.d_ff // 2) for layer in layers})
    with torch.no_grad():
        assert together.divergences(model).abs().max() < 1e-4
        with installed(layers, half):
            apart = torch.cat([each.divergences(model) for each in alone])
            assert apart.mean() > 1e-3 and torch.allclose(together.divergences(model), apart, atol=1e-4)


def test_packs_hold_what_fits_and_long_texts_are_read_alone(models, monkeypatch):
    monkeypatch.setattr(reading, "TOKENS_AT_ONCE", {"cpu": 100})
    texts = [CalibrationText([1] * n, n // 2) for n in (40, 60, 1, 300, 30, 70)]
    assert list(packs(models["llama"], texts)) == [[0, 1], [2], [3], [4, 5]]
    assert list(packs(models["bloom"], texts)) == [[i] for i in range(6)]
    assert list(packs(models["llama"], [])) == []
