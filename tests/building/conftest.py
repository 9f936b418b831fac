"""A corpus of sixty prompts, builds over it, and an index that nothing has disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builds import CONFIG, TOPICS, write_rows

from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.building.build import build_index


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """Sixty short prompts on three topics."""
    rows = [
        {"id": f"{noun}-{n}", "prompt": f"What do {noun} tell us about {topic}, case {n}?"}
        for n in range(4)
        for topic, nouns in TOPICS.items()
        for noun in nouns
    ]
    assert len(rows) == 60
    return write_rows(tmp_path_factory.mktemp("corpus") / "prompts.jsonl", rows)


@pytest.fixture(scope="session")
def build(encoder, corpus, tiny_checkpoint):
    """Build an index over the sixty prompts, on one thread unless told otherwise."""

    def run(
        out: Path, config: BuildConfig = CONFIG, model: Any = tiny_checkpoint, source: Any = corpus, **settings: Any
    ):
        return build_index(model, source, out, config, **{"encoder": encoder, "threads": 1, **settings})

    return run


@pytest.fixture(scope="session")
def built(build, tmp_path_factory) -> Path:
    """An index that nothing has disturbed."""
    out = tmp_path_factory.mktemp("built") / "index"
    build(out)
    return out
