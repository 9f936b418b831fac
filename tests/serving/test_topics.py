"""What the server tells about topics: the map, where a prompt lies, and which neurons tokens read."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest
from served import NAME, Served, backend_of, chat
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.serving.app import make_app
from coreinfer_sim.serving.backends import Backend
from coreinfer_sim.serving.topics import Neurons


def bits(text, n):
    """Return rows of n booleans."""
    rows = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, -(-n // 8))
    return np.unpackbits(rows, axis=1, count=n).astype(bool)


def test_the_map_has_all_prompts_and_topics(served, wide_index):
    found = httpx.get(f"{served.url}/api/map").json()
    dots = found["dots"]
    assert found["n_prompts"] == len(dots["x"]) == len(dots["text"]) == 9 and found["method"] == "PCA"
    assert [each["label"] for each in found["topics"]] == [each.label for each in wide_index.clusters]
    assert dots["topic"] == wide_index.map.clusters.tolist()
    np.testing.assert_allclose(np.array([dots["x"], dots["y"]]).T, wide_index.map.coordinates, atol=1e-4)


def test_a_prompt_is_placed_and_a_conversation_by_what_routes_it(served, wide_index):
    def lookup(**body):
        return httpx.post(f"{served.url}/api/lookup", json=body).json()

    alone = lookup(text=PROMPTS[1])
    assert alone["place"]["nearest"] == wide_index.place(PROMPTS[1]).nearest and alone["text"] == PROMPTS[1]
    said = [
        {"role": "user", "content": PROMPTS[1]},
        {"role": "assistant", "content": "Yeast."},
        {"role": "user", "content": "hm"},
    ]
    assert lookup(messages=said) == alone
    for body, expected in (({}, "text is missing"), ({"text": "a", "messages": said}, "text is there beside messages")):
        assert lookup(**body)["error"]["message"].startswith(expected)


def test_an_index_without_a_map(language_model, wide_index, monkeypatch):
    monkeypatch.setattr(wide_index, "manifest", type(wide_index.manifest)(**{**vars(wide_index.manifest), "map": None}))
    monkeypatch.delitem(vars(wide_index), "map", raising=False)
    with Served(make_app(backend_of(language_model, wide_index), NAME)) as server:
        found = httpx.get(f"{server.url}/api/map")
        assert found.status_code == 404 and "has no map of its prompts" in found.json()["error"]["message"]
        assert httpx.post(f"{server.url}/api/lookup", json={"text": PROMPTS[0]}).json()["place"] is None
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["coreinfer"]["map"] is False


def test_a_topic_has_core_neurons_of_which_some_are_shared(served, wide_index):
    found = httpx.get(f"{served.url}/api/topics/1/neurons").json()
    core, shared = (bits(found[name], found["d_ff"]) for name in ("core", "shared"))
    expected = [set(ids.tolist()) for ids in wide_index.core_neurons(1, found["core_ratio"]).values()]
    assert [set(np.flatnonzero(row).tolist()) for row in core] == expected
    others = [wide_index.core_neurons(each, found["core_ratio"]) for each in (0, 2)]
    for layer, row in enumerate(shared):
        assert set(np.flatnonzero(row).tolist()) == {
            n
            for n in expected[layer]
            if any(n in set(each[layer].tolist()) for each in others)  # half of two others
        }
    assert shared.any() and (core & ~shared).any()
    for topic, message in ((3, "the cluster is 3, expected 0 to 2"), ("x", "topic is")):
        answer = httpx.get(f"{served.url}/api/topics/{topic}/neurons")
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)


def test_the_neurons_of_an_answer_are_the_held_ones(client, served, wide_index):
    answer = chat(client, PROMPTS[1], extra_body={"coreinfer": {"neurons": True}})
    found = httpx.get(f"{served.url}/api/neurons/{answer.id}").json()
    assert found["n_tokens"] == 7 and found["share"] == pytest.approx(WIDE_RATIO, abs=1e-3)
    held = wide_index.core_neurons(answer.model_extra["coreinfer"]["cluster"])
    assert [np.flatnonzero(row).tolist() for row in bits(found["read"], found["d_ff"])] == [
        ids.tolist() for ids in held.values()
    ]
    dense = chat(client, extra_body={"coreinfer": {"neurons": True, "mode": "dense"}})
    assert httpx.get(f"{served.url}/api/neurons/{dense.id}").json()["share"] == 1
    for id_ in (chat(client).id, "another"):
        unknown = httpx.get(f"{served.url}/api/neurons/{id_}")
        assert unknown.status_code == 404 and "it is not known which neurons" in unknown.json()["error"]["message"]


def test_the_neurons_of_a_token_that_chooses_are_its_choice(language_model, wide_index):
    """As many as the engine has counted; an answer does not change by being watched."""
    selection = SelectionConfig(mode="all", read_ratio=0.3)
    backend = Backend(TextGenerator(language_model, wide_index, selection, DecodeConfig()))
    with Served(make_app(backend, NAME)) as server:
        client = server.client()
        plain = chat(client, PROMPTS[0], max_tokens=2)
        watched = chat(client, PROMPTS[0], max_tokens=2, extra_body={"coreinfer": {"neurons": True}})
        assert watched.choices[0].message.content == plain.choices[0].message.content
        found = httpx.get(f"{server.url}/api/neurons/{watched.id}").json()
        read = bits(found["read"], found["d_ff"])
        assert found["n_tokens"] == 1 and 0 < read.mean() < 1
        assert found["share"] == pytest.approx(watched.model_extra["coreinfer"]["read_ratio"], abs=1e-4)


def test_only_the_last_answers_are_known(wide_index):
    neurons = Neurons(wide_index)
    for number in range(40):
        neurons.begin(str(number))({})
    assert neurons.of_answer("39")["share"] == 1 and neurons.of_answer("39")["n_tokens"] == 1
    neurons.begin("40")
    assert neurons.of_answer("40")["read"] is None
    with pytest.raises(Exception, match="of the answer '0' it is not known"):
        neurons.of_answer("0")
