"""A corpus of three topics, and a tiny model that reads it."""

from __future__ import annotations

import json
import random

import pytest

from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.models.loading import load_model

TOPICS = {
    "space": ["star", "planet", "gas", "cloud", "galaxy", "light", "orbit", "moon", "sun", "dust"],
    "food": ["bread", "yeast", "oven", "soup", "salt", "butter", "flour", "egg", "milk", "sugar"],
    "law": ["court", "judge", "law", "jury", "crime", "trial", "legal", "appeal", "lawyer", "case"],
}


@pytest.fixture(scope="session")
def topics(tmp_path_factory) -> CorpusConfig:
    """84 short texts, whose topics are in a column."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choice(words) for _ in range(draw.randint(4, 12))), "topic": topic}
        for _ in range(28)
        for topic, words in TOPICS.items()
    ]
    path = tmp_path_factory.mktemp("topics") / "topics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusConfig(str(path), label_column="topic", max_tokens=48)


@pytest.fixture(scope="session")
def small(tiny_checkpoint):
    """The tiny checkpoint, loaded; a test leaves it as it was."""
    return load_model(tiny_checkpoint, "float32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing that one test counts is found by another."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
