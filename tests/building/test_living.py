"""Indexes that grow: what they hold is what one build over all texts with the same centroids gives, to the last unit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builds import LANGUAGE_MODEL_STAGE, TOPICS, StopAt, write_rows
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.errors import (
    BuildError,
    ClusteringError,
    ConfigError,
    CorpusError,
    IndexMismatchError,
    MissingSumsError,
)
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building import promise
from coreinfer_sim.building.build import build_index
from coreinfer_sim.building.extending import extend
from coreinfer_sim.building.joining import join, recluster
from coreinfer_sim.building.merging import merge
from coreinfer_sim.building.splitting import split
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo
from coreinfer_sim.reporting.differences import differences

ALONE = BuildConfig(clusters=4, shard_size=8)
NOUNS = [(topic, noun) for topic, nouns in TOPICS.items() for noun in nouns]


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def rows(begin: int, end: int) -> list[dict[str, str]]:
    return [
        {
            "id": str(n),
            "prompt": f"What do {NOUNS[n % 15][1]} tell us about {NOUNS[n % 15][0]}, case {n}?" + " And why?" * (n % 5),
        }
        for n in range(begin, end)
    ]


@pytest.fixture(scope="module")
def parts(encoder, tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """An index over the first forty texts, one over twenty more with its centroids, and one over all."""
    folder = tmp_path_factory.mktemp("living")
    for name, (begin, end) in {"old": (0, 40), "new": (40, 60), "all": (0, 60)}.items():
        write_rows(folder / f"{name}.jsonl", rows(begin, end))
        config = ALONE if name == "old" else replace(ALONE, clusters="auto", centroids=str(folder / "old"))
        build_index(tiny_checkpoint, str(folder / f"{name}.jsonl"), folder / name, config, encoder=encoder, threads=1)
    return {name: folder / name for name in ("old", "new", "all")}


def assert_equal(found: SemanticIndex, whole: SemanticIndex) -> None:
    """Compare all that is a sum, and the clusters but for their labels."""
    ours, theirs = found.sums(), whole.sums()
    for name in ("counts", "energy", "activation"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.similarity, theirs.similarity, atol=1e-6)
    np.testing.assert_array_equal(found.centroids, whole.centroids)
    for one, other in zip(found.clusters, whole.clusters, strict=True):
        assert (one.size, one.n_tokens, one.exemplar_ids, one.exemplars) == (
            other.size, other.n_tokens, other.exemplar_ids, other.exemplars,
        )  # fmt: skip
        assert one.similarity_quantiles == pytest.approx(other.similarity_quantiles, abs=1e-4)
    for cluster in (None, *range(len(whole))):
        for score in ("energy", "paper"):
            for layer, ids in whole.core_neurons(cluster, 0.4, score).items():
                assert found.core_neurons(cluster, 0.4, score)[layer].tolist() == ids.tolist()
    a, b = found.manifest, whole.manifest
    assert (a.corpus.n_sentences, a.corpus.n_tokens) == (b.corpus.n_sentences, b.corpus.n_tokens)


def test_exact_sums_are_what_the_statistics_round(parts):
    index = SemanticIndex.load(parts["all"])
    sums = index.sums()
    assert sums.energy.max() > 2**24  # more than float32 holds exactly
    for name, array in sums.statistics().items():
        stored = np.stack([index.statistics(cluster, "paper" if name == "counts" else "energy")[name == "activation"]
                           for cluster in range(len(index))])  # fmt: skip
        np.testing.assert_array_equal(array, stored)
    tokens = sum(cluster.n_tokens for cluster in index.clusters)
    assert sums.energy.sum(axis=(0, 2)) * 2.0**-30 == pytest.approx(
        tokens, rel=1e-3
    )  # each token's energy is 1 a layer


def test_an_extended_index_is_that_of_one_build(parts, encoder, tmp_path):
    said = Said()
    corpus = str(parts["new"].with_name("new.jsonl"))
    found = extend(SemanticIndex.load(parts["old"], encoder), corpus, tmp_path / "out", progress=said)
    assert_equal(found, SemanticIndex.load(parts["all"]))
    assert [each.source for each in found.manifest.sums.corpora] == ["old.jsonl", "new.jsonl"]
    assert found.manifest.corpus.source == "old.jsonl + new.jsonl"
    assert len(found.map) == 60 and found.map.excerpts[0].startswith("What do stars")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_index_is_extended_in_its_place(parts, encoder, tmp_path):
    folder = shutil.copytree(parts["old"], tmp_path / "index")
    corpus = str(parts["new"].with_name("new.jsonl"))
    found = extend(SemanticIndex.load(folder, encoder), corpus)
    assert_equal(found, SemanticIndex.load(parts["all"]))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(ConfigError, match="index holds the texts of .*new.jsonl already, as new.jsonl, .*count twice"):
        extend(SemanticIndex.load(folder, encoder), corpus)
    assert_equal(SemanticIndex.load(folder), SemanticIndex.load(parts["all"]))


def test_merged_indexes_are_that_of_one_build_in_any_order(parts, tmp_path):
    whole = SemanticIndex.load(parts["all"])
    old, new = (SemanticIndex.load(parts[name]) for name in ("old", "new"))
    assert_equal(merge([old, new], tmp_path / "one"), whole)
    other = merge([new, old], tmp_path / "other")
    for name in ("counts", "energy", "activation"):
        np.testing.assert_array_equal(getattr(other.sums(), name), getattr(whole.sums(), name))


def test_texts_of_the_promise_are_in_the_sums(parts, encoder, tiny_checkpoint, tmp_path, monkeypatch):
    """However many texts each part held out, the sums are those of all texts."""
    monkeypatch.setattr(promise, "_FEWEST_TEXTS", 30)
    monkeypatch.setattr(promise, "_SHORTEST", 8)
    said = Said()
    config = replace(ALONE, clusters="auto", centroids=str(parts["old"]))
    corpora = [str(parts[name].with_name(f"{name}.jsonl")) for name in ("old", "new")]
    first = build_index(
        tiny_checkpoint, corpora[0], tmp_path / "first", config, encoder=encoder, threads=1, progress=said
    )
    assert any("12 texts held out" in line for line in said.lines)
    assert_equal(extend(first, corpora[1], tmp_path / "out"), SemanticIndex.load(parts["all"]))


def profile(**values) -> ProfileInfo:
    return ProfileInfo(**{
        **{"keep_ratio": 1.0, "compensated": False, "max_increase": 0.03, "ratio": 1.01, "low": 1.0, "high": 1.02},
        **{"mlp_bytes": 5, "n_rows": 40, "read_ratio": 0.3, **values},
    })  # fmt: skip


def test_what_rests_on_other_texts_is_left_out_and_said(parts, tmp_path):
    old, new = (SemanticIndex.load(parts[name]) for name in ("old", "new"))
    assert old.histograms == {} == new.histograms
    # promises of what tokens choose rest on thresholds, which nothing has changed; those of plain sets do not
    old.manifest = replace(
        old.manifest, profiles={"balanced": profile(), "fast": profile(read_ratio=1.0, keep_ratio=0.5)}
    )
    kept = merge([old, new], tmp_path / "kept", progress=(said := Said()))
    assert list(kept.manifest.profiles) == ["balanced"] and "promised as fast" in said.lines[0]
    old.manifest = replace(old.manifest, profiles={"fast": profile(read_ratio=1.0, keep_ratio=0.5)})
    dropped = merge([old, new], tmp_path / "dropped", progress=(said := Said()))
    assert dropped.manifest.profiles == {}
    assert said.lines == [
        "Left out, as they rest on other texts or clusters: what was promised as fast (measure it with 'coreinfer-sim tune')."
    ]


def test_thresholds_are_added_up(parts, tmp_path):
    counts = {"old": np.arange(3 * 640).reshape(3, 640), "new": np.ones((3, 640), int)}
    loaded = []
    for name, values in counts.items():
        index = SemanticIndex.load(parts[name])
        index.manifest = replace(index.manifest, histograms=["float32"], profiles={"balanced": profile()})
        index.__dict__["histograms"] = {"float32": values}
        loaded.append(index)
    found = merge(loaded, tmp_path / "both", progress=(said := Said()))
    np.testing.assert_array_equal(found.histograms["float32"], counts["old"] + counts["new"])
    assert found.manifest.profiles == {} and "tune" in said.lines[-1]
    one = merge([loaded[0], SemanticIndex.load(parts["new"])], tmp_path / "one", progress=(said := Said()))
    np.testing.assert_array_equal(one.histograms["float32"], counts["old"])
    assert one.manifest.profiles == {"balanced": profile()} and "stay those measured" in said.lines[0]


def test_clusters_are_joined_exactly(parts, tmp_path):
    index = SemanticIndex.load(parts["all"])
    found = recluster(index, 2, tmp_path / "two")
    before, now = index.sums(), found.sums()
    ends = np.cumsum([cluster.size for cluster in index.clusters])[:-1]
    groups = join(index.centroids, np.array([part.sum() for part in np.split(before.similarity, ends)], float), 2)
    for name in ("counts", "energy", "activation"):
        whole = getattr(now, name)
        np.testing.assert_array_equal(whole.sum(0), getattr(before, name).sum(0))
        sums = [getattr(before, name)[group].sum(0) for group in groups]
        assert all(any(np.array_equal(each, row) for row in whole) for each in sums)
    assert sum(cluster.size for cluster in found.clusters) == 60 and found.clusters[0].size >= found.clusters[1].size
    assert np.bincount(found.map.clusters).tolist() == [cluster.size for cluster in found.clusters]
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    assert found.lookup("What do stars tell us about space, case 3?")[0].confident


def test_neighbours_join_first():
    angles = np.radians([0, 4, 90, 93, 180])
    centroids = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert join(centroids, np.full(5, 10.0), 3) == [[0, 1], [2, 3], [4]]
    assert join(centroids, np.array([10.0, 10, 10, 10, 0]), 3) == [
        [0],
        [1],
        [2, 3, 4],
    ]  # without members: to the nearest
    assert join(centroids, np.full(5, 10.0), 1) == [[0, 1, 2, 3, 4]]


def test_what_cannot_be_joined_is_refused(parts, tmp_path):
    index = SemanticIndex.load(parts["old"])
    with pytest.raises(
        ClusteringError, match="9 clusters were asked for, and .* has 4, which only their texts can split"
    ):
        recluster(index, 9, tmp_path / "out")
    for n in (0, 4):
        with pytest.raises(ClusteringError, match=f"{n} clusters were asked for, .*expected 1 to 3"):
            recluster(index, n, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, model=replace(m.model, dtype="float16")), "was built from another model"),
        (lambda m: replace(m, model=replace(m.model, weight_sketch=[[0.0] * 32] * 3)), "was built from another model"),
        (lambda m: replace(m, encoder=replace(m.encoder, probe=[0.5] * 8)), "was built with another encoder"),
        (lambda m: replace(m, settings=replace(m.settings, beta=0.2)), "was built with other settings"),
    ],
)
def test_indexes_of_different_models_encoders_or_settings_are_not_merged(parts, tmp_path, change, message):
    old, new = (SemanticIndex.load(parts[name]) for name in ("old", "new"))
    new.manifest = change(new.manifest)
    with pytest.raises(IndexMismatchError, match=f"{message} .* than .*, expected .*; build it with the same"):
        merge([old, new], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_indexes_of_other_centroids_are_not_merged(parts, encoder, tiny_checkpoint, tmp_path):
    corpus = str(parts["new"].with_name("new.jsonl"))
    other = build_index(tiny_checkpoint, corpus, tmp_path / "other", ALONE, encoder=encoder, threads=1)
    with pytest.raises(IndexMismatchError, match="has other centroids than .*; build it with build.centroids="):
        merge([SemanticIndex.load(parts["old"]), other], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"one index \(.*\) was named"):
        merge([other], tmp_path / "out")


def test_an_index_of_an_earlier_release_is_refused_in_one_sentence(parts, tmp_path):
    index = SemanticIndex.load(parts["old"])
    index.manifest = replace(index.manifest, sums=None)
    for call in (
        lambda: merge([index, SemanticIndex.load(parts["new"])], tmp_path / "out"),
        lambda: recluster(index, 2, tmp_path / "out"),
        lambda: extend(index, str(parts["new"].with_name("new.jsonl")), tmp_path / "out"),
    ):
        with pytest.raises(
            MissingSumsError, match="holds no exact sums, .*; build it anew with 'coreinfer-sim build-index'"
        ):
            call()
    assert list(tmp_path.iterdir()) == []


def test_clusters_and_centroids_are_not_both_given():
    with pytest.raises(ConfigError, match="clusters is 3 and centroids is 'demo'"):
        BuildConfig(clusters=3, centroids="demo")


def test_a_cluster_without_texts_is_familiar_to_nothing(parts, encoder, tiny_checkpoint, tmp_path):
    corpus = write_rows(tmp_path / "one.jsonl", [{"prompt": "What do stars tell us about space, case 1?"}])
    config = BuildConfig(centroids=str(parts["old"]))
    index = build_index(tiny_checkpoint, CorpusConfig(corpus), tmp_path / "index", config, encoder=encoder, threads=1)
    assert sorted(cluster.size for cluster in index.clusters) == [0, 0, 0, 1]
    empty = [cluster.id for cluster in index.clusters if not cluster.size]
    for match in SemanticIndex.load(tmp_path / "index", encoder).lookup("Why does bread rise?", k=4):
        assert not (match.confident and match.cluster in empty)


def test_differences_name_what_changed(parts, tmp_path):
    old, whole = (SemanticIndex.load(parts[name]) for name in ("old", "all"))
    found = differences(old, whole)
    assert ["clusters", "4", "4"] not in found.facts and not found.gone
    assert dict((name, now) for name, _, now in found.facts)["map"] == "60 prompts"
    assert sum(topic.size - topic.size_was for topic in found.topics) == 20
    assert all(topic.id == topic.was and 0 < topic.in_common <= 1 for topic in found.topics)
    same = differences(whole, whole)
    assert same.facts == [] and all(topic.is_same for topic in same.topics)
    joined = differences(whole, recluster(whole, 2, tmp_path / "two"))
    assert len(joined.topics) == 2 and len(joined.gone) == 2


def test_an_index_is_extended_by_its_own_model_alone(parts, encoder, tmp_path):
    """Before the model reads anything."""
    other = save_tiny_checkpoint(tmp_path / "other", hidden_size=64)
    corpus = str(parts["new"].with_name("new.jsonl"))
    with pytest.raises(IndexMismatchError, match="the model is .*d_model 64.*, but .*old was built from"):
        extend(SemanticIndex.load(parts["old"], encoder), corpus, tmp_path / "out", model=other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_extension_that_was_broken_off_goes_on(parts, encoder, tmp_path):
    index, corpus = SemanticIndex.load(parts["old"], encoder), str(parts["new"].with_name("new.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        extend(index, corpus, tmp_path / "out", progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("shards/*")}
    assert len(kept) == 3

    class Kept(Said):
        def start(self, stage, total, unit, done=0):
            if stage == LANGUAGE_MODEL_STAGE:
                assert done == total

    assert_equal(extend(index, corpus, tmp_path / "out", progress=Kept()), SemanticIndex.load(parts["all"]))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_corpus_that_is_there_already_is_refused_before_it_passes_through_the_model(parts, encoder, tmp_path):
    index, again = (
        SemanticIndex.load(parts["old"], encoder),
        shutil.copy(f"{parts['old']}.jsonl", tmp_path / "again.jsonl"),
    )

    class NoPass(Progress):
        def start(self, stage, total, unit, done=0):
            assert stage == "Reading the corpus"

    with pytest.raises(
        ConfigError, match=r"old holds the texts of .*again\.jsonl already, as old\.jsonl, .*leave this"
    ):
        extend(index, str(again), tmp_path / "out", progress=NoPass())
    assert [path.name for path in tmp_path.iterdir()] == ["again.jsonl"]


def test_nothing_is_made_where_a_build_is_at_work(parts, encoder, tiny_checkpoint, tmp_path):
    old, new, corpus = (
        SemanticIndex.load(parts["old"], encoder),
        SemanticIndex.load(parts["new"]),
        f"{parts['new']}.jsonl",
    )

    class Others(Progress):
        def start(self, stage, total, unit, done=0):
            for make in (
                lambda: merge([old, new], tmp_path / "out"),
                lambda: recluster(old, 2, tmp_path / "out"),
                lambda: extend(old, corpus, tmp_path / "out"),
                lambda: split(old, 6, f"{parts['old']}.jsonl", tmp_path / "out"),
            ):
                with pytest.raises(BuildError, match=r"another build is at work in .*out\.build"):
                    make()
            tried.append(stage)

    tried: list[str] = []
    build_index(tiny_checkpoint, corpus, tmp_path / "out", ALONE, encoder=encoder, threads=1, progress=Others())
    assert LANGUAGE_MODEL_STAGE in tried and SemanticIndex.load(tmp_path / "out").manifest.corpus.source == "new.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_that_was_broken_off_is_not_written_over(parts, encoder, tiny_checkpoint, tmp_path):
    old, new, corpus = SemanticIndex.load(parts["old"]), SemanticIndex.load(parts["new"]), f"{parts['new']}.jsonl"
    given = (tiny_checkpoint, corpus, tmp_path / "out", ALONE)
    with pytest.raises(KeyboardInterrupt):
        build_index(*given, encoder=encoder, threads=1, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    with pytest.raises(BuildError, match=r"out\.build holds a build that was broken off, .*finish it by its command"):
        merge([old, new], tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shards/*")}
    assert kept and not (tmp_path / "out").exists()
    assert merge([old, new], tmp_path / "out", force=True).manifest.corpus.n_sentences == 60
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shards/*")}
    found = build_index(*given, encoder=encoder, threads=1, force=True)
    assert found.manifest.corpus.source == "new.jsonl"


def test_the_widest_clusters_are_split_and_their_texts_alone_read_again(parts, encoder, tmp_path):
    index, corpus = SemanticIndex.load(parts["all"], encoder), str(parts["all"].with_name("all.jsonl"))
    found = split(index, 6, corpus, tmp_path / "six", progress=(said := Said()))
    before, now = index.sums(), found.sums()
    assert len(found) == 6 and sum(cluster.size for cluster in found.clusters) == 60
    for name in ("counts", "energy", "activation"):
        np.testing.assert_array_equal(getattr(now, name).sum(0), getattr(before, name).sum(0))
    (line,) = [line for line in said.lines if "are read again" in line]
    n_read = int(line.split("; ")[1].split()[0])
    kept = [n for n, row in enumerate(index.centroids) if any(np.array_equal(row, each) for each in found.centroids)]
    assert n_read == 60 - sum(index.clusters[number].size for number in kept) and 0 < n_read < 60
    # what was not split is what it was, and the pieces are what an index over all texts with these centroids has
    for number, cluster in enumerate(found.clusters):
        (old,) = [n for n, row in enumerate(index.centroids) if np.array_equal(row, found.centroids[number])] or [None]
        if old is not None:
            np.testing.assert_array_equal(now.energy[number], before.energy[old])
            assert replace(cluster, id=old) == index.clusters[old]
    sizes = [cluster.size for cluster in found.clusters]
    assert sizes == sorted(sizes, reverse=True) == np.bincount(found.map.clusters).tolist()
    assert np.mean(now.similarity) > np.mean(before.similarity)
    assert [path.name for path in tmp_path.iterdir()] == ["six"]


def test_a_corpus_that_is_not_the_index_s_splits_nothing(parts, encoder, tmp_path):
    index = SemanticIndex.load(parts["all"], encoder)
    with pytest.raises(
        CorpusError, match=r"holds 20 prompts of the checksum .*, expected the 60 of all.jsonl .*same column"
    ):
        split(index, 6, str(parts["new"].with_name("new.jsonl")), tmp_path / "out")
    both = merge([SemanticIndex.load(parts[name]) for name in ("old", "new")], tmp_path / "both")
    with pytest.raises(ClusteringError, match="holds 2 corpora, expected one"):
        split(both, 6, str(parts["all"].with_name("all.jsonl")), tmp_path / "out")
    with pytest.raises(ClusteringError, match="99 clusters were asked for, but the texts are cut into 60 at most"):
        split(index, 99, str(parts["all"].with_name("all.jsonl")), tmp_path / "out")
