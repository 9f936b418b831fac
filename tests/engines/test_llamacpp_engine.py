"""llama.cpp as an engine: a selection names the file, streams add up, and given tokens have the logits of our runtime."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from tiny_index import PROMPTS
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.errors import ConfigError, ContextLengthError, GenerationError, ModelError, UnknownModeError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.engine import LlamaCppEngine, StreamSettings
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.export.gguf import export_gguf
from coreinfer_sim.export.weights import Source, compact_weights, exported_selection
from coreinfer_sim.models.loading import load_model

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")
DENSE = NeuronSelection("dense")
FIRST = NeuronSelection("similarity", cluster=0)
SHORT = StreamSettings(max_new_tokens=4)


@pytest.fixture
def engine(wide_index, exported):
    with closing(LlamaCppEngine(wide_index, exported, context=128)) as engine:
        yield engine


def test_pieces_add_up_to_the_whole(engine):
    for selection in (FIRST, DENSE, NeuronSelection("global")):
        model = engine.model(selection)
        ids = model.tokenize(PROMPTS[0])
        pieces = list(model.stream(ids, SHORT))
        counts = [piece.n_new_tokens for piece in pieces]
        assert counts == sorted(counts) and counts[-1] == 4 and not pieces[-1].ended
        assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in model.stream(ids, SHORT))


def test_one_token_needs_no_decode(engine):
    model = engine.model(FIRST)
    ids = model.tokenize(PROMPTS[0])
    (piece,) = model.stream(ids, StreamSettings(max_new_tokens=1))
    assert piece.n_new_tokens == 1


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_given_tokens_score_as_in_our_runtime(wide_checkpoint, wide_index, exported, prefill):
    language_model = load_model(wide_checkpoint, "float32")
    text = language_model.tokenizer("Stars form when clouds of gas collapse.", return_tensors="pt")["input_ids"]
    start, ids = 6, text[0].tolist()
    selection = exported_selection(wide_index, 0, wide_index.manifest.settings.gamma)
    with torch.inference_mode():
        read = language_model.model(text[:, :start], use_cache=True)
        with installed(language_model.layers, selection):
            if prefill == "sparse":
                read = language_model.model(text[:, :start], use_cache=True)
            rest = language_model.model(text[:, start:-1], past_key_values=read.past_key_values).logits[0]
    logits = torch.cat([read.logits[0, -1:], rest])
    expected = logits.log_softmax(-1).gather(-1, text[0, start:, None])[:, 0]
    with closing(LlamaCppEngine(wide_index, exported, context=128, prefill=prefill)) as engine:
        found = engine.model(FIRST).score(ids, start)
        assert found == pytest.approx(expected.tolist(), abs=0.01)  # llama.cpp's cache is in float16
        assert engine.model(DENSE).score(ids, start) != pytest.approx(expected.tolist(), abs=0.1)


def test_what_cannot_be_scored_is_refused(engine):
    model = engine.model(DENSE)
    for start in (0, 3):
        with pytest.raises(ConfigError, match="expected 1 to 2"):
            model.score([1, 2, 3], start)
    with pytest.raises(ContextLengthError, match="exceed the context of 128"):
        model.score([1] * 200, 100)


def test_sets_that_depend_on_the_prompt_are_refused(engine):
    with pytest.raises(UnknownModeError, match="the mode is hybrid"):
        engine.model(NeuronSelection("hybrid", cluster=0))


def test_missing_and_damaged_files_are_named(wide_index, exported, tmp_path):
    content = json.loads((exported / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**content, "bytes": {}}))
    with closing(LlamaCppEngine(wide_index, tmp_path, context=64)) as engine:
        with pytest.raises(ModelError, match="there is no file"):
            engine.model(FIRST)
        for path in exported.glob("*.gguf"):
            (tmp_path / path.name).write_bytes(b"no model")
        with pytest.raises(ModelError, match="llama.cpp cannot load"):
            engine.model(FIRST)


def test_a_cache_of_another_shape_is_refused(wide_index, exported, tmp_path):
    other = load_model(save_tiny_checkpoint(tmp_path / "deep", intermediate_size=192, num_hidden_layers=2), "float32")
    content = json.loads((exported / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**content, "bytes": {}}))
    for path in exported.glob("cluster-*.gguf"):
        (tmp_path / path.name).symlink_to(path)
    weights = compact_weights(other, DENSE, one_width=False)
    export_gguf(other, weights, Source("m", "i", "s", "dense", 1.0, False, "f32"), tmp_path / "dense.gguf", "f32")
    with closing(LlamaCppEngine(wide_index, tmp_path, context=64)) as engine:
        model = engine.model(FIRST)
        with pytest.raises(GenerationError, match="does not fit cluster-000"):
            list(model.stream(model.tokenize(PROMPTS[0]), SHORT))
