"""No kill leaves half an index, and the same call goes on."""

from __future__ import annotations

import importlib
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from builds import (
    AS_OPTIONS,
    CONFIG,
    LANGUAGE_MODEL_STAGE,
    TOPICS,
    StopAt,
    assert_nothing_loads,
    command,
    contents,
    write_rows,
)
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.errors import BuildError
from coreinfer_sim.base.settings import Budget, BuildConfig, CompensationConfig, CorpusConfig
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model

N_SHARDS = 30
"""Of the long corpus, two texts in each."""


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory) -> str:
    """Short prompts with long completions, which keep the language model busy for seconds."""
    nouns = [noun for nouns in TOPICS.values() for noun in nouns]
    choose = random.Random(0).choice
    rows = [
        {"prompt": f"{choose(nouns)}, case {n}", "completion": " ".join(choose(nouns) for _ in range(400))}
        for n in range(N_SHARDS * 2)
    ]
    return write_rows(tmp_path_factory.mktemp("corpus") / "long.jsonl", rows)


LONG = ["--prompt-column", "prompt", "--template", "{prompt} {completion}", "--set", "corpus.max_tokens=1000"]


def test_a_killed_build_is_finished_by_the_same_command(long_corpus, tiny_checkpoint, tmp_path, monkeypatch):
    reference = tmp_path / "reference"
    assert command(long_corpus, tiny_checkpoint, reference, *LONG, shard_size=2).exit_code == 0

    out = tmp_path / "killed" / "index"
    arguments = ["build-index", long_corpus, "--model", tiny_checkpoint, "--out", str(out), *AS_OPTIONS, *LONG]
    arguments += ["--set", "build.shard_size=2"]
    code = "import torch; torch.set_num_threads(1); from coreinfer_sim_cli.main import main; main()"
    shards = out.with_name("index.build") / "shards"
    victim = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while victim.poll() is None and len(list(shards.glob("[0-9]*.safetensors"))) < 4:
            time.sleep(0.005)
    finally:
        victim.kill()
        output = victim.communicate()[0].decode()
    assert victim.returncode == -signal.SIGKILL, output

    finished = {path.name: path.stat().st_mtime_ns for path in shards.glob("[0-9]*.safetensors")}
    assert 4 <= len(finished) < N_SHARDS
    assert not out.exists()
    assert_nothing_loads(out.parent)

    watched: dict[str, Any] = {}
    commands = importlib.import_module("coreinfer_sim_cli.build_index")

    class Watch(commands.ConsoleProgress):
        def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
            watched[stage] = (total, done)

        def finish(self) -> None:
            watched["shards"] = {path.name: path.stat().st_mtime_ns for path in shards.glob("[0-9]*.safetensors")}

    monkeypatch.setattr(commands, "ConsoleProgress", Watch)
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    assert "Continuing the build" in run.stderr
    assert contents(out) == contents(reference)
    assert len(watched["shards"]) == N_SHARDS
    assert {name: watched["shards"][name] for name in finished} == finished  # none was written again
    total, done = watched[LANGUAGE_MODEL_STAGE]
    assert done == total * len(finished) // N_SHARDS  # every text is cut to the same number of tokens
    assert "Reading the corpus" not in watched
    assert [path.name for path in out.parent.iterdir()] == ["index"]


@pytest.mark.parametrize(
    ("stage", "end"),
    [
        ("Reading the corpus", False),
        ("Embedding", False),
        ("Embedding", True),
        (LANGUAGE_MODEL_STAGE, False),
        (LANGUAGE_MODEL_STAGE, True),
    ],
)
def test_a_build_goes_on_after_every_stage(build, built, tmp_path, stage, end):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(stage, end))
    assert not out.exists()
    assert_nothing_loads(tmp_path)
    build(out)
    assert contents(out) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_what_a_broken_off_write_leaves_is_swept_away(build, built, tmp_path):
    (tmp_path / ".index.part").mkdir()
    (tmp_path / ".index.part" / "manifest.json").write_text("{}")
    build(tmp_path / "index")
    assert contents(tmp_path / "index") == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": BuildConfig(clusters=3, shard_size=8, alpha=0.5)}, "alpha"),
        ({"config": BuildConfig(clusters=2, shard_size=8)}, "clusters"),
        ({"config": BuildConfig(clusters=3, shard_size=4)}, "shard_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"threads": 2}, "n_threads"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(build, built, tmp_path, changed, named):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        BuildError, match=rf"holds a build with other settings – .*{named}.* –, expected the same; .*with force"
    ):
        build(out, **changed)
    assert sorted(tmp_path.rglob("*")) == before
    build(out)
    assert contents(out) == contents(built)


def test_another_corpus_or_model_in_the_same_folder_is_refused(build, corpus, tiny_checkpoint, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE))
    with pytest.raises(BuildError, match=r"– limit \(not given there, 50 here\) –"):
        build(out, source=CorpusConfig(corpus, limit=50))
    with pytest.raises(BuildError, match="– model, weights –"):
        build(out, model=save_tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(BuildError, match="– weights –"):
        moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
        save_tiny_checkpoint(tmp_path / "other", seed=1)
        language_model = load_model(str(moved))
        with torch.no_grad():
            language_model.layers[0].output.weight.mul_(2)
        build(out, model=type(language_model)(**{**vars(language_model), "name": tiny_checkpoint}))


def test_force_starts_a_broken_off_build_anew(build, built, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, BuildConfig(clusters=2), progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    build(out, force=True)
    assert contents(out) == contents(built)


def test_force_goes_on_with_what_the_same_settings_have_left(build, built, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "index.build" / "shards").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        build(out, force=True, progress=StopAt(LANGUAGE_MODEL_STAGE))
    assert shards and shards == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "index.build" / "shards").iterdir()
    }
    build(out, force=True)
    assert contents(out) == contents(built)


def test_a_forced_build_goes_on_when_it_is_repeated(build, built, tmp_path):
    out = tmp_path / "index"
    build(out, BuildConfig(clusters=2))
    with pytest.raises(KeyboardInterrupt):
        build(out, force=True, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    shards = sorted((tmp_path / "index.build" / "shards").iterdir())
    before = [path.stat().st_mtime_ns for path in shards]
    with pytest.raises(KeyboardInterrupt):
        build(out, force=True, progress=StopAt(LANGUAGE_MODEL_STAGE))
    assert before == [path.stat().st_mtime_ns for path in shards] and before
    assert len(SemanticIndex.load(out)) == 2
    build(out, force=True)
    assert contents(out) == contents(built)


def test_other_compensation_is_made_from_the_statistics_that_are_there(build, tmp_path):
    def config(tokens: int) -> BuildConfig:
        return replace(CONFIG, compensation=CompensationConfig((0.5,), budget=Budget.UNIFORM, tokens=tokens))

    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, config(200), progress=StopAt("Compensating clusters", end=True))
    folder = tmp_path / "index.build"
    (before,) = {path.stat().st_mtime_ns for path in [folder / "shards" / "000000.safetensors"]}
    found = r"other settings – compensation tokens \(200 there, 300 here\) –, .* start anew with force – where only"
    with pytest.raises(BuildError, match=found):
        build(out, config(300))
    with pytest.raises(KeyboardInterrupt):
        build(out, config(300), force=True, progress=StopAt("Compensating clusters"))
    assert before == (folder / "shards" / "000000.safetensors").stat().st_mtime_ns
    assert not list((folder / "compensation").rglob("0*.safetensors"))
    anew = build(tmp_path / "anew", config(300))
    index = build(out, config(300), force=True)
    assert index.manifest.files == anew.manifest.files and index.manifest.compensation[0].tokens == 300


def test_an_edited_corpus_is_not_mixed_with_the_old_one(build, tmp_path):
    rows = [{"prompt": f"What do {noun} do?"} for nouns in TOPICS.values() for noun in nouns]
    source = write_rows(tmp_path / "corpus.jsonl", rows)
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, source=source, progress=StopAt(LANGUAGE_MODEL_STAGE))
    write_rows(tmp_path / "corpus.jsonl", [{"prompt": "Where do whales sleep?"}, *rows])
    try:
        index = build(out, source=source)
    except BuildError:  # saying so is as good as reading it anew
        return
    assert index.manifest.corpus.n_sentences == len(rows) + 1


def test_what_a_kill_cut_short_does_not_get_into_the_index(build, built, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE))
    left = tmp_path / "index.build" / "shards" / ".000000.safetensors.77.part"
    left.write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE))
    assert not left.exists()
