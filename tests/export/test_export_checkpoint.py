"""An exported checkpoint is an ordinary one: stock transformers loads it and computes what generate computes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from exportable import IDS, SOURCE, exportable, fitted, logits_of, stock_logits
from tiny_models import N_LAYERS, tiny_model

from coreinfer_sim.base.errors import ExportError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.export.checkpoint import check_exportable, export_checkpoint
from coreinfer_sim.export.weights import compact_weights

WITHOUT_BIASES = ("mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2")
"""Mistral because the tiny one attends to a window."""


def test_plain_sets_load_in_stock_transformers(model, tmp_path):
    language_model = exportable(model)
    layer = language_model.layers[0]
    kept = torch.arange(0, layer.d_ff, 2)
    selection = NeuronSelection("t", dict.fromkeys(range(N_LAYERS), kept))
    weights = compact_weights(language_model, selection, one_width=True)
    if layer.family == "bloom":
        with pytest.raises(ExportError, match="fixes the width"):
            export_checkpoint(language_model, weights, SOURCE, tmp_path / "out")
        return
    export_checkpoint(language_model, weights, SOURCE, tmp_path / "out")
    stock, logits = stock_logits(tmp_path / "out", IDS)
    assert type(stock) is type(model)
    assert torch.allclose(logits, logits_of(language_model, selection, IDS), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "out/coreinfer_sim.json").read_text())["which"] == 3
    assert (tmp_path / "out/tokenizer.json").exists() and (tmp_path / "out/generation_config.json").exists()


def test_square_matrices_of_gpt2_are_laid_out_as_it_stores_them(tmp_path):
    config = transformers.GPT2Config(vocab_size=80, n_positions=64, n_embd=64, n_layer=N_LAYERS, n_head=4, n_inner=256)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    language_model = exportable(model)
    kept = torch.arange(0, 256, 4)  # as many as the model is wide
    selection = NeuronSelection("t", dict.fromkeys(range(N_LAYERS), kept))
    export_checkpoint(
        language_model, compact_weights(language_model, selection, one_width=True), SOURCE, tmp_path / "out"
    )
    _, logits = stock_logits(tmp_path / "out", IDS)
    assert torch.allclose(logits, logits_of(language_model, selection, IDS), rtol=1e-3, atol=1e-4)


def test_compensated_sets_load_in_stock_transformers_or_are_refused(model, tmp_path):
    language_model = exportable(model)
    layer = language_model.layers[0]
    n_kept = [layer.d_ff // 3, layer.d_ff // 2, layer.d_ff // 2]
    selection = fitted(language_model, n_kept)
    weights = compact_weights(language_model, selection, one_width=True)
    if layer.family in (*WITHOUT_BIASES, "bloom"):
        assert layer.family == "bloom" or weights.has_bias
        with pytest.raises(ExportError, match="generate"):
            check_exportable(language_model, weights.has_bias)
        return
    export_checkpoint(language_model, weights, SOURCE, tmp_path / "out")
    stock, logits = stock_logits(tmp_path / "out", IDS)
    expected = logits_of(language_model, selection, IDS)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert type(stock).__name__ == ("LlamaForCausalLM" if layer.family == "qwen2" else type(model).__name__)


@pytest.mark.parametrize("key", ["llama", "qwen2", "opt", "gpt2"])
def test_use_cache_of_training_is_not_handed_on(key, tmp_path):
    model = tiny_model(key)
    model.config.use_cache = model.generation_config.use_cache = False
    language_model = exportable(model)
    layer = language_model.layers[0]
    selection = NeuronSelection("t", dict.fromkeys(range(N_LAYERS), torch.arange(0, layer.d_ff, 2)))
    export_checkpoint(
        language_model, compact_weights(language_model, selection, one_width=True), SOURCE, tmp_path / "out"
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()).get("use_cache") is not False
    assert model.config.use_cache is model.generation_config.use_cache is False  # the model itself is left alone
