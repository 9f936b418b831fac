"""A corpus, the index that the command builds over it, and ways to build others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from commands import ONE_PROCESS, TOPICS, call, setting, succeeded, write_rows

from coreinfer_sim.models.loading import load_model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    rows = [
        {"prompt": f"What do {noun} tell us about {topic}, case {n}?", "completion": f"All of {noun} {n}."}
        for n in range(3)
        for topic, nouns in TOPICS.items()
        for noun in nouns
    ]
    return write_rows(tmp_path_factory.mktemp("corpus") / "prompts.jsonl", rows)


@pytest.fixture(scope="session")
def built(corpus, tiny_checkpoint, tmp_path_factory) -> tuple[Path, Result]:
    """An index and what the command said that built it."""
    out = tmp_path_factory.mktemp("built") / "index"
    return out, succeeded(
        "build-index",
        corpus,
        "--model",
        tiny_checkpoint,
        "--out",
        out,
        "--clusters",
        3,
        *setting("build.gamma", 0.5),
        *ONE_PROCESS,
    )


@pytest.fixture(scope="session")
def index(built) -> Path:
    """An index; read-only."""
    return built[0]


@pytest.fixture
def damaged(index, tmp_path) -> Path:
    """A copy of the index, to be damaged."""
    return shutil.copytree(index, tmp_path / "damaged")


@pytest.fixture
def build(corpus, tiny_checkpoint, tmp_path):
    """Run build-index into a new folder with other arguments."""

    def run(*more: Any, source: Any = corpus, out: Any = tmp_path / "out" / "index") -> Result:
        return call("build-index", source, "--model", tiny_checkpoint, "--out", out, *ONE_PROCESS, *more)

    return run


@pytest.fixture(scope="session")
def dense_text(tiny_checkpoint) -> str:
    """What transformers' own greedy generate gives."""
    loaded = load_model(tiny_checkpoint)
    ids = loaded.tokenizer("How do stars form?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = loaded.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def stores(tmp_path, monkeypatch) -> Path:
    """Where this test's neuron-major stores go."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"
