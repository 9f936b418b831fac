"""Texts whose tokens read a share of the neurons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_index import PROMPTS, tiny_index
from tiny_models import save_tiny_checkpoint, tiny_model, tiny_tokenizer

import coreinfer_sim
from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.engines.lean import laid_out
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.models.loading import load_model

PROMPT = "How do stars form?"
GREEDY = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def index(language_model, encoder):
    return tiny_index(language_model.layers, encoder)


class Started(Progress):
    """What has begun."""

    def __init__(self):
        self.titles = []

    def start(self, title, total, unit):
        self.titles.append(title)


def test_without_an_index_all_neurons_are_held(language_model):
    with coreinfer_sim.load(None, language_model, read_ratio=0.3) as generator:
        run = generator.generate(PROMPT, **GREEDY)
        dense = generator.generate(PROMPT, mode="dense", **GREEDY)
    assert (run.selection.mode, run.keep_ratio, dense.read_ratio) == ("all", 1.0, 1.0)
    assert 0.2 < run.read_ratio < 0.4
    assert run.as_dict()["read_ratio"] == round(run.read_ratio, 4)
    assert run.token_ids != dense.token_ids
    with coreinfer_sim.load(None, language_model, mode="all") as generator:
        every = generator.generate(PROMPT, **GREEDY)
    assert every.token_ids == dense.token_ids and every.read_ratio == 1.0
    assert every.mlp_bytes_per_token == dense.mlp_bytes_per_token == dense.dense_mlp_bytes_per_token


@pytest.mark.parametrize("weights", ["stored", "int8", "int4"])
def test_scores_are_those_of_the_tokens_that_were_generated(language_model, weights):
    with coreinfer_sim.load(None, language_model, read_ratio=0.4, weights=weights) as generator:
        run = generator.generate(PROMPT, **GREEDY)
        scores = generator.score(PROMPT, run.text)
        dense = generator.score(PROMPT, run.text, mode="dense")
    if len(scores) == len(run.token_ids):  # else the text is other tokens
        assert sum(scores) > sum(dense)
    assert scores != dense


def test_unfamiliar_prompts_are_read_densely(language_model, index):
    generator = TextGenerator(language_model, index, SelectionConfig(read_ratio=0.3))
    near, far = (generator.generate(text, **GREEDY) for text in (PROMPTS[2], "zzz"))
    dense = generator.generate("zzz", mode="dense", **GREEDY)
    assert (near.selection.mode, near.keep_ratio, near.selection.confident) == ("similarity", 1.0, True)
    assert 0.2 < near.read_ratio < 0.4
    assert (far.selection.mode, far.selection.confident, far.read_ratio) == ("dense", False, 1.0)
    assert far.token_ids == dense.token_ids and far.mlp_bytes_per_token == dense.mlp_bytes_per_token


@pytest.mark.parametrize("mode", ["similarity", "hybrid", "stability", "global", "random"])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_every_mode_holds_what_it_would_hold(language_model, index, mode, prefill):
    if prefill == "sparse" and mode in ("hybrid", "stability"):
        return
    config, decode = SelectionConfig(mode, 0.6, fallback="none"), DecodeConfig(prefill=prefill)
    run = TextGenerator(language_model, index, replace(config, read_ratio=0.3), decode).generate(PROMPT, **GREEDY)
    held = TextGenerator(language_model, index, config, decode).generate(PROMPT, **GREEDY)
    assert run.keep_ratio == held.keep_ratio == pytest.approx(held.read_ratio) and held.keep_ratio < 0.65
    assert 0.05 < run.read_ratio < 0.35
    assert all(torch.equal(run.selection.ids[n], held.selection.ids[n]) for n in held.selection.ids)


def test_generators_of_two_ratios_do_not_disturb_each_other(language_model):
    def texts(*generators):
        return [generator.generate(PROMPT, **GREEDY).token_ids for generator in generators]

    with (
        coreinfer_sim.load(None, language_model, read_ratio=0.2) as few,
        coreinfer_sim.load(None, language_model, read_ratio=0.7) as many,
    ):
        first, second = texts(few), texts(many)
        assert texts(few, many, few) == [*first, *second, *first] and first != second


def test_thresholds_are_measured_once(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    first, second, other = Started(), Started(), Started()
    for progress, weights in ((first, "int8"), (second, "int8"), (other, "int4")):
        coreinfer_sim.load(None, tiny_checkpoint, read_ratio=0.3, weights=weights, progress=progress).close()
    what = "Measuring what tokens need"
    assert [what in each.titles for each in (first, second, other)] == [True, False, True]
    assert len(list((tmp_path / "thresholds").iterdir())) == 2


def test_packed_weights_of_a_type_that_was_named(tiny_checkpoint, tmp_path, monkeypatch):
    """Such are not laid out on the disk; the second time nothing is measured before prefill takes the weights over."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    found = []
    for dtype in ("auto", "float32", "float32"):
        settings = {"read_ratio": 0.3, "weights": "int8", "dtype": dtype}
        with coreinfer_sim.load(None, tiny_checkpoint, **settings) as generator:
            found.append(generator.generate(PROMPT, **GREEDY).token_ids)
    assert found[0] == found[1] == found[2]


def test_what_cannot_be_served_is_refused_before_anything_is_generated(language_model, tmp_path):
    for engine in ("transformers", "compiled"):
        with pytest.raises(ConfigError, match=f"the engine {engine} reads all held neurons"):
            coreinfer_sim.load(None, language_model, read_ratio=0.3, engine=engine)
    for key, reason in (("bloom", "the engine transformers reads all held neurons"), ("gpt2", "MLPs have no gates")):
        tiny_model(key).save_pretrained(tmp_path / key)
        tiny_tokenizer().save_pretrained(tmp_path / key)
        with pytest.raises(ConfigError, match=reason):
            coreinfer_sim.load(None, str(tmp_path / key), read_ratio=0.3)
    coreinfer_sim.load(None, language_model, mode="dense", read_ratio=0.3, engine="transformers").close()


def test_llama_cpp_has_no_read_ratio(wide_index, exported):
    with pytest.raises(ConfigError, match="read_ratio does not apply to the engine llamacpp"):
        coreinfer_sim.load(wide_index, engine="llamacpp", exported=str(exported), read_ratio=0.3)


def test_a_model_of_another_shape_has_thresholds_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    for number, settings in enumerate(({}, {"intermediate_size": 64}, {"num_hidden_layers": 2})):
        folder = save_tiny_checkpoint(tmp_path / f"model{number}", **settings)
        loaded = laid_out.load_laid_out(folder, laid_out.Weights.INT8, by_token=True)
        with coreinfer_sim.load(None, loaded, read_ratio=0.3, weights="int8") as generator:
            assert 0.15 < generator.generate(PROMPT, **GREEDY).read_ratio < 0.45
    assert len(list((tmp_path / "cache" / "thresholds").iterdir())) == 3
