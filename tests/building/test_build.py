"""The same files every time, whoever shares the work."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from builds import LANGUAGE_MODEL_STAGE, TOPICS, command, contents, write_rows
from encoders import OTHERS

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model


def test_two_runs_give_the_same_files(build, built, tmp_path):
    build(tmp_path / "index")
    assert contents(tmp_path / "index") == contents(built)


def test_the_command_gives_the_same_files(built, corpus, tiny_checkpoint, tmp_path):
    out = tmp_path / "index"
    run = command(corpus, tiny_checkpoint, out)
    assert run.exit_code == 0, run.output
    assert contents(out) == contents(built)


class WaitForHelper(Progress):
    """Lets this process go on only after another one has finished a shard, so that both take part."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._n_own = folder, 0
        self.helped = self._running = False

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self._running = stage == LANGUAGE_MODEL_STAGE

    def advance(self, n: int) -> None:
        self._n_own += self._running
        deadline = time.monotonic() + 60
        while self._running and not self.helped and time.monotonic() < deadline:
            self.helped = len(list(self._folder.glob("[0-9]*.safetensors"))) > self._n_own
            time.sleep(0.01)


def test_two_processes_give_the_same_files_as_one(build, built, tmp_path):
    progress = WaitForHelper(tmp_path / "index.build" / "shards")
    build(tmp_path / "index", workers=2, progress=progress)
    assert progress.helped
    assert contents(tmp_path / "index") == contents(built)


def test_the_threads_of_the_caller_do_not_change_the_files(build, tmp_path):
    nouns = [noun for nouns in TOPICS.values() for noun in nouns]
    source = write_rows(tmp_path / "corpus.jsonl", [{"prompt": f"{nouns[n % 15]}, case {n}"} for n in range(60)])
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            build(tmp_path / f"index-{n}", source=source, threads=1)
    finally:
        torch.set_num_threads(1)
    assert contents(tmp_path / "index-1") == contents(tmp_path / "index-2")


def test_the_batch_size_does_not_change_the_core_neurons(build, tmp_path):
    one, sixteen = (
        build(tmp_path / f"index-{n}", BuildConfig(clusters=3, shard_size=32, batch_size=n), dtype="float32")
        for n in (1, 16)
    )
    n_same = n_all = 0
    for cluster in (None, 0, 1, 2):
        for score in ("energy", "paper"):
            for keep_ratio in (0.1, 0.4, 0.8):
                ids = [index.core_neurons(cluster, keep_ratio, score) for index in (one, sixteen)]
                for layer in range(3):
                    n_same += len(set(ids[0][layer].tolist()) & set(ids[1][layer].tolist()))
                    n_all += len(ids[0][layer])
    assert n_all > 1000 and n_same / n_all >= 0.999


def test_a_loaded_model_stays_in_one_process(build, built, tiny_checkpoint, tmp_path):
    language_model = load_model(tiny_checkpoint)
    for workers in (2, None):
        with pytest.raises(ConfigError, match="a loaded model cannot be shared among processes; .*workers=1"):
            build(tmp_path / "index", model=language_model, workers=workers)
    assert list(tmp_path.iterdir()) == []
    build(tmp_path / "index", model=language_model, workers=1)
    assert contents(tmp_path / "index") == contents(built)


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_numbers_of_processes_and_threads_are_at_least_1(build, tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} is 0, expected 1 or more"):
        build(tmp_path / "index", **{name: 0})


def test_the_number_of_threads_is_put_back(build, tmp_path):
    before = torch.get_num_threads()
    build(tmp_path / "index", threads=2)
    assert torch.get_num_threads() == before == 1


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_encoders_that_are_no_transformers(make, build, tmp_path):
    """The index finds the encoder again by its folder."""
    folder = make(tmp_path / "encoder")
    rows = [{"prompt": f"how do {noun} form , case {n} ?"} for n in range(4) for noun in ("stars", "bread", "soup")]
    build(tmp_path / "index", source=write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "\u200b"}]), encoder=folder)
    index = SemanticIndex.load(tmp_path / "index")
    assert len(index) == 3 and index.manifest.encoder.dimension == 8
    found = [index.lookup(f"how do {noun} form , case 1 ?")[0] for noun in ("stars", "bread", "soup")]
    assert len({match.cluster for match in found}) > 1
    assert all(match.similarity > 0.8 and match.confident for match in found)
