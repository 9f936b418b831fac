"""All engines give the same answers, and modes share their prepared weights."""

from __future__ import annotations

import openai
import pytest
from served import NAME, Served, chat
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.settings import Fallback
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.opening import load
from coreinfer_sim.serving.app import make_app
from coreinfer_sim.serving.backends import Backend, TextRequest


def test_all_modes_share_one_cache_of_prepared_weights(language_model, wide_index):
    def held(cache_bytes):
        """Bytes that the cache holds after each of three modes."""
        selection = SelectionConfig(keep_ratio=WIDE_RATIO, fallback=Fallback.NONE)
        decode = DecodeConfig(cache_bytes=cache_bytes, engine="transformers")
        generator = TextGenerator(language_model, wide_index, selection, decode)
        backend, cache, found = Backend(generator), generator.engines[0].cache, []
        for mode in ("similarity", "global", "random"):
            backend.complete(TextRequest(PROMPTS[0], 4, mode, temperature=0), lambda _text: None)
            found.append(cache.n_bytes)
        backend.close()
        assert cache.n_bytes == 0
        return found

    one, two, three = held(1 << 30)
    assert 0 < one < two < three  # every mode put its weights into it
    assert max(held(1)) <= 1.1 * one  # and a mode's weights drop those of the others


def test_llama_cpp_serves_the_same_answers(client, wide_index, exported):
    generator = load(wide_index, fallback="none", engine="llamacpp", exported=str(exported), context=256)
    with Served(make_app(Backend(generator), NAME)) as server:
        for text in PROMPTS[:2]:
            theirs, ours = chat(server.client(), text), chat(client, text)
            assert theirs.usage == ours.usage
            assert theirs.model_extra["coreinfer"]["confident"] == ours.model_extra["coreinfer"]["confident"]
            assert theirs.model_extra["coreinfer"]["cluster"] == ours.model_extra["coreinfer"]["cluster"]
        with pytest.raises(openai.BadRequestError, match="expected one of similarity, global, dense"):
            chat(server.client(), extra_body={"coreinfer": {"mode": "hybrid"}})


def test_llama_cpp_reads_requests_as_the_other_engines_do(client, wide_index, exported):
    generator = load(wide_index, fallback="none", engine="llamacpp", exported=str(exported), context=256)
    with Served(make_app(Backend(generator), NAME, max_new_tokens=12)) as server:
        other = server.client()
        assert other.models.list().data[0].model_extra["coreinfer"]["chat"] is True
        whole = chat(other, max_tokens=32_000, user="me")
        assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
        assert whole.model_extra["coreinfer"]["ignored"] == ["user"]
        text = whole.choices[0].message.content
        stops = [*(f"never {number}" for number in range(9)), text[-1]]
        cut = chat(other, max_tokens=12, stop=stops)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (text[: text.find(text[-1])], "stop")
        parts = list(chat(other, max_tokens=12, stop=stops, stream=True, stream_options={"include_usage": True}))
        assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == cut.choices[0].message.content
        assert parts[-1].usage == cut.usage
        turns = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": None}]
        assert chat(other, [*turns, turns[0]], extra_body={"chat_template_kwargs": {"enable_thinking": False}}).usage
        with pytest.raises(openai.BadRequestError, match="context of 256") as error:
            chat(other, "word " * 300)
        assert error.value.code == "context_length_exceeded"
        sampled = [chat(other, temperature=1, top_p=0.9, seed=3, extra_body={"min_p": 0.01}).choices for _ in range(2)]
        assert sampled[0] == sampled[1]
