"""An index with compensated sets, built once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compensation_cases import COMPENSATION

from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building.build import build_index


@pytest.fixture(scope="session")
def built(tiny_checkpoint, encoder, tmp_path_factory) -> Path:
    """An index with compensated sets at two keep ratios, built by two workers."""
    folder = tmp_path_factory.mktemp("compensated")
    topics = ["stars and planets", "bread and cheese", "judges and courts"]
    rows = [{"question": f"Tell me of {topics[i % 3]}, {i}.", "answer": f"They are {i} and more."} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build_index(
        tiny_checkpoint,
        CorpusConfig(str(folder / "rows.jsonl"), template="{question} {answer}"),
        folder / "index",
        BuildConfig(clusters=3, compensation=COMPENSATION),
        encoder=encoder,
        workers=2,
    )
    return folder / "index"
