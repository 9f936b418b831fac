"""What a build promises, on texts that thresholds and fits have not seen."""

from __future__ import annotations

import json
from functools import partial

import pytest
from builds import TOPICS, write_rows
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig, Profile
from coreinfer_sim.building import promise
from coreinfer_sim.building.build import build_index
from coreinfer_sim.building.promise import held_out
from coreinfer_sim.evaluation.tune import choose_profiles
from coreinfer_sim.index.index import SemanticIndex


class Said(Progress):
    """Remembers what was said."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, message):
        self.lines.append(message)


def sentences(*n_tokens):
    return [Row(str(number), "p", n_tokens=n) for number, n in enumerate(n_tokens)]


def test_some_long_texts_are_held_out_evenly():
    assert held_out(sentences(*[50] * 199)) == []
    few = held_out(sentences(*[50] * 240))
    assert few == list(range(0, 240, 20))
    assert len(held_out(sentences(*[50] * 1200))) == 20 and len(held_out(sentences(*[50] * 9000))) == 40
    mixed = held_out(sentences(*[10, 50] * 150))
    assert len(mixed) == 12 and all(number % 2 for number in mixed)
    assert held_out(sentences(*[10] * 290, *[50] * 11)) == []


@pytest.fixture
def corpus(tmp_path):
    nouns = [(topic, noun) for topic, each in TOPICS.items() for noun in each]
    rows = [
        {"id": str(n), "prompt": f"What do {noun} tell us about {topic}, case {n}? They tell us a lot, and then some."}
        for n, (topic, noun) in enumerate(nouns * 2)
    ]
    return write_rows(tmp_path / "corpus.jsonl", rows)


def allow(monkeypatch, increase):
    """Let every profile lose so much of perplexity."""
    most = dict.fromkeys((Profile.BALANCED, Profile.FAST), increase)
    monkeypatch.setattr(promise, "choose_profiles", partial(choose_profiles, max_increases=most))


def built(corpus, tiny_checkpoint, encoder, tmp_path, **more):
    said = Said()
    config = BuildConfig(clusters=3, shard_size=8)
    index = build_index(
        tiny_checkpoint, CorpusConfig(corpus, **more), tmp_path / "index", config, encoder=encoder, progress=said
    )
    return index, said.lines


def test_a_build_promises_what_it_has_measured(corpus, tiny_checkpoint, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 30)
    allow(monkeypatch, 90.0)
    index, lines = built(corpus, tiny_checkpoint, encoder, tmp_path)
    profile = index.manifest.profile
    assert index.manifest.profiles == {"balanced": profile, "fast": profile}
    assert (profile.keep_ratio, profile.read_ratio, profile.weights) == (1.0, 0.2, "stored")
    assert profile.layout == "float32" and profile.n_rows == 12 and profile.low <= profile.ratio <= profile.high
    assert any("12 texts held out" in line for line in lines)
    assert 0 < profile.gain < 1 and index.manifest.default_profile is Profile.BALANCED
    assert [line for line in lines if line.startswith("Profile ")] == [
        f"Profile {name}: {profile.in_words()}." for name in ("balanced", "fast")
    ]
    assert profile.in_words().startswith("tokens choose, read ratio 0.2: perplexity ")
    assert index.manifest.corpus.n_sentences == 30 == sum(cluster.size for cluster in index.clusters)
    assert SemanticIndex.load(tmp_path / "index", encoder).manifest.profiles == index.manifest.profiles


def test_a_promise_that_nothing_keeps_leaves_decode_dense(corpus, tiny_checkpoint, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 30)
    allow(monkeypatch, -0.9)
    index, lines = built(corpus, tiny_checkpoint, encoder, tmp_path)
    assert index.manifest.profile.is_dense and index.manifest.default_profile is Profile.EXACT
    assert [line for line in lines if line.startswith("Profile fast: no gain")]


def test_few_texts_promise_nothing_and_all_are_counted(corpus, tiny_checkpoint, encoder, tmp_path):
    index, lines = built(corpus, tiny_checkpoint, encoder, tmp_path)
    assert index.manifest.profile is None and index.manifest.corpus.n_sentences == 30
    (line,) = [line for line in lines if line.startswith("Nothing is promised")]
    assert "takes 200 texts" in line and line.endswith("what it may leave out.")


def test_models_that_skip_zeros_need_no_promise(corpus, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 30)
    index, lines = built(corpus, save_tiny_checkpoint(tmp_path / "relu", hidden_act="relu"), encoder, tmp_path)
    assert index.manifest.profile is None
    assert any(line.endswith("what ReLU does not set to zero, which loses nothing.") for line in lines)


def test_what_was_measured_is_not_measured_again(corpus, tiny_checkpoint, encoder, tmp_path, monkeypatch):
    """A build that was killed after it goes on with what it has found."""
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 30)
    allow(monkeypatch, 90.0)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coreinfer_sim.building.build.write_index", killed)
        built(corpus, tiny_checkpoint, encoder, tmp_path)
    kept = json.loads(next(tmp_path.glob("index.build/profiles.json")).read_text(encoding="utf-8"))
    monkeypatch.setattr(promise, "evaluate", killed)
    index, _ = built(corpus, tiny_checkpoint, encoder, tmp_path)
    assert index.manifest.profile.ratio == kept["balanced"]["ratio"] and index.manifest.profile.n_rows == 12
