"""Weights that are laid out by neuron, for tokens to choose among."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from layouts import PROMPT, Said, folders, rewrite, text_of
from tiny_models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

import coreinfer_sim
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.engines.lean import laid_out
from coreinfer_sim.models.fingerprint import weight_sketch
from coreinfer_sim.models.layout_file import kept_layouts
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import linear_parameters

BY_TOKEN = {"mode": "all", "read_ratio": 0.3}


def halved(folder, **settings):
    """A tiny checkpoint in bfloat16."""
    model = load_model(save_tiny_checkpoint(folder, **settings)).model
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", ["stored", "bf16", "int8", "int4"])
def test_a_layout_by_token_is_mapped_later_and_gives_the_same(weights, cache, tmp_path):
    folder, first, second = halved(tmp_path / "model"), Said(), Said()
    text = text_of(folder, first, weights=weights, **BY_TOKEN)
    assert ["once" in line for line in first.lines] == [True]
    (place,) = folders(cache)
    assert text_of(folder, second, weights=weights, **BY_TOKEN) == text and not second.lines
    assert folders(cache) == [place]
    # the same as of weights that are laid out in memory, the thresholds measured or kept
    for again in range(2):
        loaded = load_model(str(folder), "stored")
        with coreinfer_sim.load(None, loaded, weights=weights, **BY_TOKEN) as generator:
            generator.take_over()
            assert generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text == text
        if not again:
            shutil.rmtree(cache.parent / "thresholds")
    assert text_of(folder, weights=weights, mode="all") != text  # all are read


def test_layouts_by_token_lie_apart_from_others(cache, tmp_path):
    folder = halved(tmp_path / "model")
    for settings in ({"weights": "int8"}, {"weights": "int8", **BY_TOKEN}, {"weights": "bf16", **BY_TOKEN}):
        text_of(folder, **settings)
    assert len(folders(cache)) == 3
    text_of(folder, **BY_TOKEN)  # which is of bfloat16 as it is
    assert len(folders(cache)) == 3
    kinds = {layout.weights for _, layout in kept_layouts() if layout is not None}
    assert kinds == {"int8", "int8 by token", "bf16 by token"}


@pytest.mark.parametrize("family", ["llama", "llama-relu-bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_prefill_reads_the_weights_that_lie_by_neuron(family, weights, cache, tmp_path):
    """As a model whose own weights are the widened ones, but for rounded inputs; what was stored is kept to the bit."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for _ in range(2):
        loaded = laid_out.load_laid_out(str(tmp_path / "model"), laid_out.Weights(weights), by_token=True)
        wide = tiny_model(family)
        assert weight_sketch(loaded.layers) == weight_sketch(load_model(str(tmp_path / "model")).layers)
        for name, module in wide.named_modules():
            if type(module) is torch.nn.Linear:
                weight, bias = linear_parameters(loaded.model.get_submodule(name))
                if weights == "stored":
                    assert torch.equal(weight, module.weight)
                assert (bias is None) == (module.bias is None)
                assert bias is None or torch.allclose(bias[: len(module.bias)], module.bias)
                module.weight.data = weight
        ids = torch.arange(4, 44)[None]
        with torch.no_grad():
            one, other = loaded.model(input_ids=ids).logits, wide(input_ids=ids).logits
        error = (one - other).square().mean() / other.square().mean()
        assert error <= (1e-5 if weights == "stored" else 0.05) ** 2


@pytest.mark.parametrize("damage", ["cut", "changed", "no manifest", "another kind"])
def test_a_damaged_layout_by_token_is_made_anew(damage, checkpoint, cache):
    text = text_of(checkpoint, weights="int8", **BY_TOKEN)
    (place,) = folders(cache)
    weights, manifest = place / "weights.bin", place / "layout.json"
    if damage == "cut":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "changed":
        with weights.open("r+b") as file:
            file.seek(20000)
            file.write(b"\xff" * 64)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        rewrite(place, lambda content: content["places"].pop("0:records"))
    said = Said()
    assert text_of(checkpoint, said, weights="int8", **BY_TOKEN) == text
    assert "laid out anew" in said.lines[0] and len(said.lines) == 2
    again = Said()
    assert text_of(checkpoint, again, weights="int8", **BY_TOKEN) == text and not again.lines


def test_a_layout_of_an_earlier_version_is_used(checkpoint, cache):
    text = text_of(checkpoint, weights="int8")
    (place,) = folders(cache)
    rewrite(place, lambda content: content["facts"].pop("mlps"))
    said = Said()
    assert text_of(checkpoint, said, weights="int8") == text and not said.lines


def test_without_room_weights_by_token_are_laid_out_in_memory(checkpoint, cache):
    cache.parent.write_text("a file where a folder should be")
    said = Said()
    text = text_of(checkpoint, said, weights="int4", **BY_TOKEN)
    assert "in memory" in said.lines[0]
    cache.parent.unlink()
    assert text_of(checkpoint, weights="int4", **BY_TOKEN) == text


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
def test_codes_of_a_file_are_read_by_token(kind, cache, quantised_file):
    """Laid out or in memory; and a later start maps the same."""
    path, first, second = quantised_file(kind), Said(), Said()
    text = text_of(path, first, **BY_TOKEN)
    assert "once" in first.lines[-1]
    assert text_of(path, second, **BY_TOKEN) == text and not second.lines
    assert text != text_of(path)  # where all are read
    with coreinfer_sim.load(None, load_model(str(path), "stored"), **BY_TOKEN) as generator:
        generator.take_over()
        assert generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text == text
    with coreinfer_sim.load(None, str(path), mode="all") as whole:
        expected = text_of(path)
        assert whole.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text == expected


def test_a_model_that_was_opened_without_a_read_ratio_says_so(checkpoint, cache):
    loaded = laid_out.load_laid_out(str(checkpoint), laid_out.Weights.INT8)
    with pytest.raises(ConfigError, match="the model was opened without a read ratio"):
        coreinfer_sim.load(None, loaded, weights="int8", **BY_TOKEN)
