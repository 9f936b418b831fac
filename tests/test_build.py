"""Builds: the numbers are those of the definitions, and no kill, full disk or second build leaves half an index."""

from __future__ import annotations

import errno
import importlib
import json
import math
import multiprocessing.process
import operator
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from coreinfer_sim_cli.main import main
from safetensors.numpy import load_file
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.corpus import read_corpus
from coreinfer_sim.base.errors import BuildError, ClusteringError, ConfigError, CorpusError, IndexFormatError
from coreinfer_sim.base.files import sha256_of
from coreinfer_sim.base.processes import interrupts_held, run_shards
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Budget, BuildConfig, CompensationConfig, CorpusConfig
from coreinfer_sim.building.build import build_index
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model, tokenizer_hash

FILES = ("centroids.faiss", "neurons.safetensors", "clusters.jsonl", "manifest.json")
TOPICS = {
    "space": ["stars", "planets", "galaxies", "comets", "moons"],
    "food": ["bread", "cheese", "soup", "salad", "cake"],
    "law": ["contracts", "courts", "judges", "appeals", "statutes"],
}
CONFIG = BuildConfig(clusters=3, shard_size=8)
AS_OPTIONS = ["--clusters", "3", "--shard-size", "8", "--workers", "1", "--threads", "1"]
LANGUAGE_MODEL_STAGE = "Language model"


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory) -> str:
    """Short prompts with long completions, which keep the language model busy for seconds."""
    nouns = [noun for nouns in TOPICS.values() for noun in nouns]
    choose = random.Random(0).choice
    rows = [
        {"prompt": f"{choose(nouns)}, case {n}", "completion": " ".join(choose(nouns) for _ in range(400))}
        for n in range(300)
    ]
    return write_rows(tmp_path_factory.mktemp("corpus") / "long.jsonl", rows)


@pytest.fixture(scope="module")
def build(encoder, corpus, tiny_checkpoint):
    """Build an index over the sixty prompts, on one thread unless told otherwise."""

    def run(
        out: Path, config: BuildConfig = CONFIG, model: Any = tiny_checkpoint, source: Any = corpus, **settings: Any
    ):
        return build_index(model, source, out, config, **{"encoder": encoder, "threads": 1, **settings})

    return run


@pytest.fixture(scope="module")
def built(build, tmp_path_factory) -> Path:
    """An index that nothing has disturbed."""
    out = tmp_path_factory.mktemp("built") / "index"
    build(out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an index."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


def assert_nothing_loads(folder: Path) -> None:
    """Look at every folder, hidden ones too."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        with pytest.raises(IndexFormatError):
            SemanticIndex.load(path)


class StopAt(Progress):
    """Breaks a build off, as Ctrl-C does, when a stage begins or ends."""

    def __init__(self, stage: str, end: bool = False) -> None:
        self._stage, self._end, self._now = stage, end, ""

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self._now = stage
        if stage == self._stage and not self._end:
            raise KeyboardInterrupt

    def finish(self) -> None:
        if self._now == self._stage and self._end:
            raise KeyboardInterrupt


# What is in an index


def test_the_manifest_says_what_the_index_was_built_from(built, corpus, tiny_checkpoint, encoder):
    raw = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    language_model = load_model(tiny_checkpoint)
    tokenize = language_model.tokenizer
    prompts = [json.loads(line)["prompt"] for line in Path(corpus).read_text().splitlines()]
    drawn, report = read_corpus(CorpusConfig(corpus), lambda texts: tokenize(texts)["input_ids"])
    assert len(list(drawn)) == 60

    assert raw["format_version"] == 2
    for name in ("coreinfer-sim", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy"):
        assert raw["versions"][name] == version(name)
    sketch = raw["model"].pop("weight_sketch")
    assert np.array(sketch).shape == (3, 32)
    stored = {
        f"{value:.6g}" for layer in language_model.layers for value in layer.output.weight.detach().flatten().tolist()
    }
    assert {f"{value:.6g}" for row in sketch for value in row} <= stored
    assert raw["model"] == {
        "name": tiny_checkpoint,
        "revision": None,
        "family": "Llama",
        "dtype": "float32",
        "n_layers": 3,
        "d_model": 32,
        "d_ff": 48,
        "tokenizer_sha256": tokenizer_hash(tokenize),
        "activation_site": "input of down_proj",
    }
    assert raw["encoder"] == {
        "name": "sentence-transformers/all-MiniLM-L6-v2",
        "dimension": 384,
        "normalised": True,
        "metric": "cosine",
        "probe": encoder.probe(),
    }
    assert raw["corpus"] == {
        "source": "prompts.jsonl",
        "sha256": report.sha256,
        "n_sentences": 60,
        "n_tokens": sum(len(tokenize(prompt)["input_ids"]) for prompt in prompts),
    }
    assert raw["settings"] == {
        "n_clusters": 3,
        "alpha": 0.4,
        "beta": 0.4,
        "gamma": 0.8,
        "seed": 0,
        "layers": [0, 1, 2],
        "batch_size": 16,
        "shard_size": 8,
        "n_threads": 1,
    }
    for name in FILES[:3]:
        assert raw["files"][name] == {"size": (built / name).stat().st_size, "sha256": sha256_of(built / name)}


def test_the_clusters_are_the_topics(built, corpus, encoder):
    index = SemanticIndex.load(built, encoder)
    topics = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
    found = []
    for cluster in index.clusters:
        assert cluster.size == 20 and len(cluster.exemplars) == len(cluster.exemplar_ids) == 3
        (topic,) = {topics[id_.split("-")[0]] for id_ in cluster.exemplar_ids}
        assert topic in cluster.label
        assert all(topic in exemplar for exemplar in cluster.exemplars)
        quantiles = list(cluster.similarity_quantiles.values())
        assert quantiles[0] > 0.5 and quantiles == sorted(quantiles) and quantiles[-1] < 1
        found.append(topic)
    assert sorted(found) == sorted(TOPICS)
    assert sum(cluster.n_tokens for cluster in index.clusters) == index.manifest.corpus.n_tokens
    rows = [json.loads(line) for line in Path(corpus).read_text().splitlines()]
    matches = index.lookup([row["prompt"] for row in rows])
    assert [found[match.cluster] for (match,) in matches] == [topics[row["id"].split("-")[0]] for row in rows]


def test_a_finished_build_leaves_nothing_beside_the_index(built):
    assert [path.name for path in built.parent.iterdir()] == ["index"]
    contents(built)


def keep(seen: dict[int, torch.Tensor], layer: int, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    """Note what a down projection reads: the activation site [n_tokens, d_ff]."""
    seen[layer] = inputs[0][0]


def definitions(checkpoint: str, texts: list[str], alpha: float, beta: float) -> dict[str, np.ndarray]:
    """Compute a model's statistics of each sentence from the definitions, plainly: arrays [n_texts, n_layers, d_ff]."""
    language_model = load_model(checkpoint, "float32")
    d_ff, n_layers = 48, 3
    shape = (len(texts), n_layers, d_ff)
    found = {name: np.zeros(shape) for name in ("counts", "energy", "activation")}
    for s, text in enumerate(texts):
        seen: dict[int, torch.Tensor] = {}
        hooks = [
            block.mlp.down_proj.register_forward_pre_hook(partial(keep, seen, layer))
            for layer, block in enumerate(language_model.model.model.layers)
        ]
        with torch.no_grad():
            language_model.model(language_model.tokenizer(text, return_tensors="pt")["input_ids"])
        for hook in hooks:
            hook.remove()
        for layer, z in seen.items():
            f = [0] * d_ff  # f(n; s)
            for token in z.tolist():
                positive = sorted((n for n in range(d_ff) if token[n] > 0), key=lambda n: -token[n])
                for n in positive[: math.ceil(alpha * len(positive))]:  # C_alpha of the token
                    f[n] += 1
                norm = math.sqrt(sum(value**2 for value in token))
                found["energy"][s, layer] += [(value / norm) ** 2 for value in token]
                found["activation"][s, layer] += [max(value, 0) for value in token]
            ranked = sorted(range(d_ff), key=lambda n: (-f[n], -found["activation"][s, layer, n], n))
            found["counts"][s, layer, ranked[: math.floor(beta * d_ff)]] = 1  # C_alpha^beta of the sentence
    return found


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 1), (4, 6), (2, 4)])
def test_the_statistics_are_those_of_the_definitions(build, tmp_path, tiny_checkpoint, encoder, batch_size, shard_size):
    texts = [
        "How do stars form from gas and dust?",
        "Why do planets circle their star?",
        "What is a galaxy?",
        "Why does bread rise in the oven, and what does the yeast eat while it does?",
        "How is cheese made?",
        "What makes a soup thick?",
    ]
    source = write_rows(tmp_path / "six.jsonl", [{"prompt": text} for text in texts])
    config = BuildConfig(clusters=2, alpha=0.3, beta=0.35, batch_size=batch_size, shard_size=shard_size)
    index = build(tmp_path / "index", config, source=source)
    cluster_of = [match.cluster for (match,) in index.lookup(texts)]
    assert sorted(cluster.size for cluster in index.clusters) == sorted(np.bincount(cluster_of).tolist())
    expected = definitions(tiny_checkpoint, texts, 0.3, 0.35)
    stored = load_file(tmp_path / "index" / "neurons.safetensors")
    for c in range(2):
        members = [s for s in range(6) if cluster_of[s] == c]
        sums = {name: values[members].sum(axis=0) for name, values in expected.items()}
        np.testing.assert_array_equal(stored["counts"][c], sums["counts"])
        np.testing.assert_allclose(stored["energy"][c], sums["energy"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stored["activation"][c], sums["activation"], rtol=1e-4, atol=1e-4)
        for score, name in (("energy", "energy"), ("paper", "counts")):
            for layer, ids in index.core_neurons(c, 0.25, score).items():
                key = list(zip(-sums[name][layer], -sums["activation"][layer], range(48), strict=True))
                assert ids.tolist() == sorted(sorted(range(48), key=key.__getitem__)[:12])


def test_the_energies_of_a_token_sum_to_one(built):
    index, stored = SemanticIndex.load(built), load_file(built / "neurons.safetensors")
    n_tokens = np.array([cluster.n_tokens for cluster in index.clusters])
    np.testing.assert_allclose(stored["energy"].sum(axis=2), np.tile(n_tokens[:, None], 3), rtol=1e-4)
    n_core = 20 * math.floor(0.4 * 48)  # sentences of a cluster, times their sentence-wise core neurons
    assert (stored["counts"].sum(axis=2) == n_core).all()


def test_only_the_layers_asked_for_are_recorded(build, built, tmp_path):
    index = build(tmp_path / "index", BuildConfig(clusters=3, shard_size=8, layers="1:"))
    assert index.manifest.settings.layers == [1, 2] and index.manifest.model.n_layers == 3
    some, every = (load_file(folder / "neurons.safetensors") for folder in (tmp_path / "index", built))
    for name, values in some.items():
        np.testing.assert_array_equal(values, every[name][:, 1:])
    assert list(index.core_neurons(0, layers="2")) == [2]
    with pytest.raises(ConfigError, match=r"layers \[0\] were not recorded"):
        index.core_neurons(0)


def test_layers_that_the_model_lacks_are_refused(build, tmp_path):
    with pytest.raises(ConfigError, match="'3:', which names none of 3 layers"):
        build(tmp_path / "index", BuildConfig(layers="3:"))
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut_before_the_model_reads_them(build, tmp_path):
    rows = [{"prompt": noun, "completion": f"{noun} " * 50} for noun in ("stars", "bread", "courts", "moons")]
    source = CorpusConfig(
        write_rows(tmp_path / "c.jsonl", rows), prompt_column="prompt", template="{completion}", max_tokens=10
    )
    index = build(tmp_path / "index", BuildConfig(clusters=2), source=source)
    assert index.manifest.corpus.n_tokens == 40
    energy = load_file(tmp_path / "index" / "neurons.safetensors")["energy"]
    np.testing.assert_allclose(energy.sum(axis=(0, 2)), 40, rtol=1e-4)


def test_more_tokens_than_the_model_reads_are_refused(build, corpus, tmp_path):
    with pytest.raises(ConfigError, match="max_tokens is 1025, but the model's context is 1024; .*--max-tokens"):
        build(tmp_path / "index", source=CorpusConfig(corpus, max_tokens=1025))
    assert list(tmp_path.iterdir()) == []


# The same every time


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


# Broken off and continued


def command(corpus: str, model: str, out: Path, *more: str) -> Result:
    """Run build-index in this process."""
    return CliRunner().invoke(main, ["build-index", corpus, "--model", model, "--out", str(out), *AS_OPTIONS, *more])


LONG = ["--prompt-column", "prompt", "--template", "{prompt} {completion}", "--max-tokens", "1000", "--shard-size", "2"]


def test_a_killed_build_is_finished_by_the_same_command(long_corpus, tiny_checkpoint, tmp_path, monkeypatch):
    reference = tmp_path / "reference"
    assert command(long_corpus, tiny_checkpoint, reference, *LONG).exit_code == 0

    out = tmp_path / "killed" / "index"
    arguments = ["build-index", long_corpus, "--model", tiny_checkpoint, "--out", str(out), *AS_OPTIONS, *LONG]
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
    assert 4 <= len(finished) < 150
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
    assert len(watched["shards"]) == 150
    assert {name: watched["shards"][name] for name in finished} == finished  # none was written again
    total, done = watched[LANGUAGE_MODEL_STAGE]
    assert done == total * len(finished) // 150  # every text is cut to the same number of tokens
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
        BuildError, match=rf"holds a build with other settings – .*{named}.* –, expected the same; .*--force"
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
    found = r"other settings – compensation tokens \(200 there, 300 here\) –, .* --force to start anew – where only"
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


# The output folder


def test_an_index_that_exists_is_not_replaced(build, built, tmp_path):
    out = shutil.copytree(built, tmp_path / "index")
    with pytest.raises(BuildError, match=r"index exists already, expected a new folder; .*--force"):
        build(out, BuildConfig(clusters=2))
    assert contents(out) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_force_replaces_an_index(build, built, tmp_path):
    out = tmp_path / "index"
    assert len(build(out, BuildConfig(clusters=2))) == 2
    assert len(build(out, force=True)) == 3
    assert contents(out) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_force_keeps_the_old_index_until_the_new_one_is_there(build, built, tmp_path):
    out = shutil.copytree(built, tmp_path / "index")
    with pytest.raises(KeyboardInterrupt):
        build(out, BuildConfig(clusters=2), force=True, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    assert contents(out) == contents(built)
    assert len(SemanticIndex.load(out)) == 3


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_index_is_never_replaced(build, tmp_path, force):
    out = tmp_path / "home"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(BuildError, match="home exists"):
        build(out, force=force)
    assert (out / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"source": "/nowhere/corpus.jsonl"}, CorpusError),
        ({"config": BuildConfig(clusters=61)}, ClusteringError),
    ],
)
def test_a_build_that_cannot_start_leaves_nothing_that_loads(build, tmp_path, settings, error):
    with pytest.raises(error):
        build(tmp_path / "index", **settings)
    assert not (tmp_path / "index").exists()
    assert_nothing_loads(tmp_path)


def test_more_clusters_than_prompts_is_said_before_anything_is_computed(build, tmp_path):
    stages = []

    class Stages(Progress):
        def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
            stages.append(stage)

    with pytest.raises(ClusteringError, match="61 clusters were asked for, but the corpus holds 60 prompts"):
        build(tmp_path / "index", BuildConfig(clusters=61), progress=Stages())
    assert stages == ["Reading the corpus"]
    assert not (tmp_path / "index.build").exists()  # or it would stand in the way of the right number


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a build folder, as a build at work does."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        yield


@pytest.mark.parametrize("force", [False, True])
def test_a_second_build_in_the_same_folder_is_refused(build, built, tmp_path, force):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    with held(tmp_path / "index.build"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BuildError, match=r"another build is at work in .*index\.build"):
            build(out, force=force)
        assert sorted(tmp_path.rglob("*")) == before
    build(out)
    assert contents(out) == contents(built)


def test_a_build_holds_its_folder_while_it_runs(build, tmp_path):
    class Second(Progress):
        def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
            with pytest.raises(BuildError, match="another build is at work"):
                build(tmp_path / "index")
            tried.append(stage)

    tried: list[str] = []
    build(tmp_path / "index", progress=Second())
    assert {"Reading the corpus", "Embedding", LANGUAGE_MODEL_STAGE} <= set(tried)


# Processes


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


@pytest.mark.parametrize(
    ("make_run", "job", "message"),
    [
        (os._exit, 3, r"a worker process ended with exit code 3; finished shards are kept"),
        (math.sqrt, -1, r"a worker process failed \(ValueError: .*\); finished shards are kept"),
    ],
    ids=["dies", "raises"],
)
def test_a_process_that_fails_is_reported(make_run, job, message):
    done: list[int] = []
    with pytest.raises(BuildError, match=message):
        run_shards([0, 1, 2], operator.pos, 2, make_run, job, done.append)
    assert done == [0, 1, 2]  # this process has done the others' share as well


def test_a_process_that_cannot_start_is_reported(monkeypatch):
    def start(self):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        run_shards([0, 1, 2], operator.pos, 3, math.sqrt, 1, lambda _: None)


# A full disk


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Make every write beyond ``n_bytes`` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory) -> str:
    """A model whose statistics are larger than three centroids."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", intermediate_size=256)


@pytest.fixture(scope="module")
def wide(build, wide_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "index"
    build(out, model=wide_checkpoint)
    return out


BEFORE_SHARDS, AFTER_SHARDS = StopAt(LANGUAGE_MODEL_STAGE), StopAt(LANGUAGE_MODEL_STAGE, end=True)


@pytest.mark.parametrize(
    ("model", "before", "room"),
    [
        ("wide", None, lambda files: 100),
        ("wide", None, lambda files: 3000),
        ("wide", None, lambda files: 20_000),
        ("wide", BEFORE_SHARDS, lambda files: 2000),
        ("wide", AFTER_SHARDS, lambda files: 100),
        ("wide", AFTER_SHARDS, lambda files: files["neurons.safetensors"] - 1),
        ("tiny", AFTER_SHARDS, lambda files: files["neurons.safetensors"] + 1),
        ("tiny", AFTER_SHARDS, lambda files: files["centroids.faiss"] - 1),
    ],
    ids=["plan", "corpus", "embeddings", "shards", "index", "neurons", "centroids", "last byte of the centroids"],
)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    build, built, wide, tiny_checkpoint, wide_checkpoint, corpus, tmp_path, model, before, room
):
    whole, checkpoint = (wide, wide_checkpoint) if model == "wide" else (built, tiny_checkpoint)
    files = {name: (whole / name).stat().st_size for name in FILES}
    assert (files["neurons.safetensors"] > files["centroids.faiss"]) == (model == "wide")
    out = tmp_path / "index"
    if before is not None:
        with pytest.raises(KeyboardInterrupt):
            build(out, model=checkpoint, progress=before)
    kept = set(tmp_path.rglob("*.safetensors"))
    with largest_file(room(files)):
        run = command(corpus, checkpoint, out)
    assert run.exit_code == 1
    assert isinstance(run.exception, SystemExit), run.exception
    (error,) = [line for line in run.stderr.splitlines() if "Error:" in line]
    assert re.search(r"^Error: .*free some space .*run the same command again", error), error
    assert "Traceback" not in run.output
    assert not out.exists()
    assert_nothing_loads(tmp_path)
    assert kept <= set(tmp_path.rglob("*.safetensors"))  # finished shards are still there

    run = command(corpus, checkpoint, out)
    assert run.exit_code == 0, run.output
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_disk_that_is_too_small_is_refused_beforehand(build, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BuildError, match=r"1000 B are free beside .*index, expected \d+\.\d KiB; free some space"):
        build(tmp_path / "index")


def test_what_a_build_has_written_is_not_asked_of_the_disk_again(build, tmp_path, monkeypatch):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))

    def wanted(out: Path) -> float:
        with pytest.raises(BuildError, match="0 B are free") as refused:
            build(out)
        return float(re.search(r"expected ([\d.]+) KiB", str(refused.value))[1])

    written = sum(path.stat().st_size for path in (tmp_path / "index.build" / "shards").iterdir()) / 1024
    assert wanted(tmp_path / "other") - wanted(out) == pytest.approx(written, abs=0.2)


def test_a_build_with_auto_clusters_looks_at_the_disk_once_they_are_chosen(build, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BuildError, match="1000 B are free beside"):
        build(tmp_path / "index", BuildConfig())


def test_what_a_kill_cut_short_does_not_get_into_the_index(build, built, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE))
    left = tmp_path / "index.build" / "shards" / ".000000.safetensors.77.part"
    left.write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE))
    assert not left.exists()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_a_process_that_is_only_starting_leaves_ctrl_c_to_its_parent():
    asks = [sys.executable, "-c", "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"]
    with interrupts_held():
        assert subprocess.run(asks, capture_output=True, text=True, check=True).stdout.strip() == "True"
    assert subprocess.run(asks, capture_output=True, text=True, check=True).stdout.strip() == "False"
