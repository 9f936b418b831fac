"""Tiny models that can be exported, texts to fit them to, and what an exported one computes."""

from __future__ import annotations

import torch
import transformers
from compensation_cases import some_texts

from coreinfer_sim.engines.modules import installed
from coreinfer_sim.export.weights import Source
from coreinfer_sim.fitting.layerwise import Fit, fit_layers
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import find_mlps

SOURCE = Source("some-model", "some-index", "abc", 3, 0.5, True, "f32")
IDS = torch.tensor([[5, 9, 23, 7, 40, 11, 3, 64]])


class _Tokenizer:
    """Export asks a tokenizer to save itself; the tiny families have none of their own."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def exportable(model):
    return LanguageModel(model, _Tokenizer(), "tiny", find_mlps(model))


def logits_of(language_model, selection, ids):
    with installed(language_model.layers, selection), torch.inference_mode():
        return language_model.model(ids).logits


def stock_logits(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model, model(ids).logits


def fitted(language_model, n_kept):
    """A selection of so many neurons a layer that is compensated on random texts."""
    return fit_layers(language_model, some_texts(10), n_kept, Fit())
