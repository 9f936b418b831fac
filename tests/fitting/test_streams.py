"""Fits see just what decode will see, in every family."""

from __future__ import annotations

import torch
from compensation_cases import language_model_of, some_texts
from tiny_models import N_LAYERS

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.fitting.streams import advance, decoder_blocks, make_batches


@torch.inference_mode()
def test_the_sparse_stream_is_what_decode_reads(model):
    language_model = language_model_of(model)
    layers, blocks = language_model.layers, decoder_blocks(language_model)
    texts = some_texts(5)
    kept = {n: torch.arange(n % 2, layers[n].d_ff, 2) for n in range(N_LAYERS)}
    batches = list(make_batches(language_model, blocks, texts, 0.3))
    assert sum(len(batch.dense) for batch in batches) == len(texts)
    for layer, block in zip(layers, blocks, strict=True):
        selection = NeuronSelection("test", {layer.number: kept[layer.number]})
        for batch in batches:
            batch.dense_out = batch.calls[layer.number](block, batch.dense)
        with installed(layers, selection):
            advance(layer, block, batches)
    found = []
    hook = blocks[-1].register_forward_hook(lambda _m, _i, o: found.append(o[0] if isinstance(o, tuple) else o))
    rows = [(batch, row) for batch in batches for row in range(len(batch.dense))]
    for text, (batch, row) in zip(sorted(texts, key=lambda text: -len(text.ids)), rows, strict=True):
        prompt, completion = text.ids[: text.n_prompt], text.ids[text.n_prompt :]
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
        with installed(layers, NeuronSelection("test", kept)):
            model(torch.tensor([completion]), past_key_values=cache, use_cache=True)
        decoded = found[-1].reshape(-1, layers[0].d_model)
        stream = batch.sparse[row, text.n_prompt : len(text.ids)]
        assert torch.allclose(stream, decoded, atol=1e-4 * decoded.abs().max())
    hook.remove()
