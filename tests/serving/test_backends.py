"""Both backends give the same answers, and a conversation is routed by its topic."""

from __future__ import annotations

import openai
import pytest
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS

from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
from coreinfer_sim.serving.app import make_app
from coreinfer_sim.serving.backends import LlamaCppBackend, TextRequest, routing_text


def test_all_modes_share_one_cache_of_compact_weights(language_model, wide_index):
    def held(cache_bytes):
        """Bytes that the cache holds after each of three modes."""
        options = {"cache_bytes": cache_bytes, "engine": "transformers"}
        backend = backend_of(language_model, wide_index, runtime=options)
        found = []
        for mode in ("similarity", "global", "random"):
            backend.complete(TextRequest(PROMPTS[0], 4, mode, temperature=0), lambda _text: None)
            found.append(backend.compacts.n_bytes)
        backend.close()
        assert backend.compacts.n_bytes == 0
        return found

    one, two, three = held(1 << 30)
    assert 0 < one < two < three  # every mode put its weights into it
    assert max(held(1)) <= 1.1 * one  # and a mode's weights drop those of the others


def test_llama_cpp_serves_the_same_answers(client, wide_index, exported):
    generator = LlamaCppGenerator(wide_index, exported, fallback="none", context=256)
    with Served(make_app(LlamaCppBackend(generator), NAME)) as server:
        for text in PROMPTS[:2]:
            theirs, ours = chat(server.client(), text), chat(client, text)
            assert theirs.usage == ours.usage
            assert theirs.model_extra["coreinfer"]["confident"] == ours.model_extra["coreinfer"]["confident"]
            assert theirs.model_extra["coreinfer"]["cluster"] == ours.model_extra["coreinfer"]["cluster"]
        with pytest.raises(openai.BadRequestError, match="expected one of similarity, global, dense"):
            chat(server.client(), extra_body={"coreinfer": {"mode": "hybrid"}})


def test_a_conversation_moves_with_its_topic(wide_index):
    def said(*texts):
        return routing_text(wide_index, [{"role": "user", "content": text} for text in texts])

    assert said(PROMPTS[0] + " 1", "zzz qqq 17") == PROMPTS[0] + " 1"
    assert said(PROMPTS[0] + " 1", PROMPTS[1] + " 2") == PROMPTS[1] + " 2"
    assert said("zzz qqq 17") == "zzz qqq 17" and routing_text(wide_index, "text") == "text"
