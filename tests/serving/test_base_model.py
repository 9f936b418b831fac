"""A model without a chat template continues texts, and says so."""

from __future__ import annotations

import openai
import pytest
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS

from coreinfer_sim.serving.app import make_app


@pytest.fixture
def base_client(language_model, wide_index, monkeypatch):
    monkeypatch.setattr(language_model.tokenizer, "chat_template", None)
    with Served(make_app(backend_of(language_model, wide_index), NAME)) as server:
        yield server.client()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_conversation_is_sent_to_completions(base_client, stream):
    with pytest.raises(openai.BadRequestError, match="send it as prompt to /v1/completions") as error:
        chat(base_client, stream=stream)
    assert "--" not in str(error.value)
    answer = base_client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=4)
    assert answer.usage.completion_tokens == 4


def test_the_list_of_models_tells(base_client, client):
    assert base_client.models.list().data[0].model_extra["coreinfer"]["chat"] is False
    assert client.models.list().data[0].model_extra["coreinfer"]["chat"] is True
