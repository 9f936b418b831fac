"""A stranger's engine of some sixty lines generates, is evaluated and is served like our own."""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager

import pytest
import torch
from calls import RowPredictor, assert_same_output, generate, selection, token_ids
from fastapi.testclient import TestClient
from tiny_index import PROMPTS, WIDE_RATIO

import coreinfer_sim
from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError, UnknownEngineError
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines import registry
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.evaluation.contenders import parse_contenders
from coreinfer_sim.evaluation.run import evaluate
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import dense_bytes, other_bytes
from coreinfer_sim.serving.app import make_app
from coreinfer_sim.serving.backends import Backend

ROWS = [
    Row(str(n), prompt, completion="Nobody knows, but many books tell of it.", set_name="questions")
    for n, prompt in enumerate(PROMPTS)
]


class MaskedEngine(Engine):
    """Zeroes dropped neurons where the output projections read them; nothing is cut, so that a step reads all weights."""

    name = "masked"

    @classmethod
    def refuses(cls, model, config):
        return None if config.weights is Weights.STORED else "it multiplies weights as they are stored"

    def cut(self, selection):
        masks = {number: torch.zeros(self.layers[number].d_ff) for number in selection.ids}
        for number, ids in selection.ids.items():
            masks[number][ids] = 1.0
        return masks

    def size(self, layers):
        return sum(mask.nbytes for mask in layers.values())

    @contextmanager
    def mounted(self, groups):
        hooks = [layer.output.register_forward_pre_hook(self.masking(layer, groups)) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def masking(self, layer, groups):
        mask = torch.ones(sum(len(rows) for rows, _ in groups), 1, layer.d_ff)
        for rows, prepared in groups:
            mask[rows] = prepared.layers.get(layer.number, torch.ones(layer.d_ff))

        def masked(_module, inputs):
            (z,) = inputs
            return (z.reshape(len(mask), -1, layer.d_ff) * mask.to(z)).reshape(z.shape)

        return masked

    def step(self, inputs, groups):
        with self.mounted(groups):
            output = inputs.forward(**inputs.given)
        self.count(groups)
        return output

    def forced(self, ids, cache, prepared):
        with self.mounted([([0], prepared)]), torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=copy.deepcopy(cache), use_cache=True)
        self.count([([0], prepared)], ids.shape[1])
        return output.logits[0].float()

    def other_bytes(self):
        return other_bytes(self.model, self.layers)

    def mlp_bytes(self, held):
        return dense_bytes(self.layers)


@pytest.fixture(autouse=True)
def registered():
    registry.register(MaskedEngine)
    yield
    registry.unregister(MaskedEngine)
    with pytest.raises(UnknownEngineError, match="expected auto or one of lean, transformers, compiled"):
        registry.engine_class("masked")


@pytest.fixture(scope="module")
def language_model(wide_checkpoint):
    return load_model(wide_checkpoint, "float32")


def opened(language_model, index, engine, **settings):
    settings = {"keep_ratio": WIDE_RATIO, "fallback": "none", **settings}
    return coreinfer_sim.load(index, language_model, engine=engine, **settings)


def test_an_engine_is_at_most_sixty_lines():
    assert len(inspect.getsource(MaskedEngine).splitlines()) <= 60


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_it_generates(language_model, wide_index, prefill):
    with (
        opened(language_model, wide_index, "masked", prefill=prefill) as masked,
        opened(language_model, wide_index, "transformers", prefill=prefill) as cut,
    ):
        for prompt in PROMPTS:
            found, expected = (each.generate(prompt, max_new_tokens=12) for each in (masked, cut))
            assert found.token_ids == expected.token_ids
            assert found.selection.cluster == expected.selection.cluster is not None
            assert (found.engine, expected.engine) == ("masked", "transformers")
            assert found.mlp_bytes_per_token == expected.dense_mlp_bytes_per_token > expected.mlp_bytes_per_token
            assert masked.score(prompt, " Well.") == pytest.approx(cut.score(prompt, " Well."), abs=1e-4)
        assert "".join(masked.stream(PROMPTS[0], max_new_tokens=12)) == cut.generate(PROMPTS[0], max_new_tokens=12).text


def test_it_decodes_batches(models):
    model = models["llama"]
    rows = RowPredictor(selection(model, 0.3, seed=1), selection(model, 0.6, seed=2))
    found, expected = (
        generate(SparseModel(model, rows, engine=engine), token_ids(2, 6), num_return_sequences=2, num_beams=2)
        for engine in ("masked", "transformers")
    )
    assert torch.equal(found.sequences, expected.sequences)
    greedy = [
        generate(SparseModel(model, rows, engine=engine), token_ids(2, 6)) for engine in ("masked", "transformers")
    ]
    assert_same_output(*greedy)


def test_it_is_evaluated(language_model, wide_index):
    contenders = parse_contenders(["dense", "random", "similarity", "stability"], [0.4], ["energy"], ["16bit"])
    found, expected = (
        evaluate(
            language_model, contenders, ROWS, wide_index, decode=DecodeConfig(engine=engine), max_new_tokens=6, seed=1
        )
        for engine in ("masked", "transformers")
    )
    assert len(found) == len(expected) == len(contenders) * len(ROWS)
    for one, other in zip(found, expected, strict=True):
        assert (one.contender, one.row_id, one.text) == (other.contender, other.row_id, other.text)
        assert one.loss == pytest.approx(other.loss, abs=1e-3) and one.kl == pytest.approx(other.kl, abs=1e-3)
        assert (one.n_tokens, one.n_same_top) == (other.n_tokens, other.n_same_top)


def test_it_is_served(language_model, wide_index):
    expected = opened(language_model, wide_index, "transformers").generate(PROMPTS[1], chat=True, max_new_tokens=8)
    backend = Backend(opened(language_model, wide_index, "masked"))
    with TestClient(make_app(backend, "tiny")) as client:
        message = {"role": "user", "content": PROMPTS[1]}
        request = {"model": "tiny", "messages": [message], "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=request).json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["coreinfer"]["engine"] == "masked"
    assert answer["coreinfer"]["cluster"] == expected.selection.cluster


def test_its_refusal_is_told(language_model, wide_index):
    with pytest.raises(ConfigError, match="masked: it multiplies weights as they are stored"):
        opened(language_model, wide_index, "masked", weights="int8")
