"""The map: what is alike lies near, it is the same every time, and a file that says otherwise is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from index_folder import changed_at, raw_manifest, replace_file, rewrite, save
from safetensors.numpy import load
from safetensors.numpy import save as to_bytes
from threadpoolctl import threadpool_limits

from coreinfer_sim.base.errors import IndexFormatError, MissingMapError
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import MAP_FILE
from coreinfer_sim.index.prompt_map import MOST_PROMPTS, PromptMap, lay_out


def planted(n: int, n_topics: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors around orthogonal directions, and the direction of each."""
    random = np.random.default_rng(seed)
    topics = random.integers(n_topics, size=n)
    vectors = np.eye(16)[topics] + 0.1 * random.standard_normal((n, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), topics


def laid_out(n: int, texts: bool = True, seed: int = 0) -> PromptMap:
    vectors, topics = planted(n)
    return lay_out(vectors, topics, [f"prompt {number}" for number in range(n)], seed, texts)


SMALL = replace(
    laid_out(12), clusters=np.arange(12, dtype=np.int32) % 3, embeddings=np.eye(4, dtype=np.float16)[[0] * 12]
)


@pytest.mark.parametrize(("n", "method"), [(40, "PCA"), (130, "t-SNE")])
def test_prompts_of_a_topic_lie_together(n, method):
    found = laid_out(n)
    assert found.info().method == method and found.coordinates.dtype == np.float32
    assert found.excerpts == [f"prompt {number}" for number in range(n)]
    assert np.abs(found.coordinates).max() == pytest.approx(1)
    distances = np.linalg.norm(found.coordinates[:, None] - found.coordinates[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    alike = found.clusters[distances.argmin(1)] == found.clusters
    assert alike.mean() > 0.9


def test_a_map_is_the_same_for_any_number_of_threads():
    with threadpool_limits(1):
        first = laid_out(130)
    with threadpool_limits(2):
        assert first.as_bytes() == laid_out(130).as_bytes()


def test_of_a_large_corpus_some_prompts_are_drawn(monkeypatch):
    monkeypatch.setattr("coreinfer_sim.index.prompt_map.MOST_PROMPTS", 50)
    found, other = laid_out(500), laid_out(500, seed=1)
    numbers = [int(text.split()[1]) for text in found.excerpts]
    assert (
        len(found) == 50 and numbers == sorted(set(numbers)) and numbers[-1] > 400 and found.excerpts != other.excerpts
    )
    vectors, topics = planted(500)
    assert found.clusters.tolist() == topics[numbers].tolist()
    np.testing.assert_allclose(found.embeddings, vectors[numbers], atol=1e-3)
    assert MOST_PROMPTS >= 400


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_smallest_corpora_have_a_map(n):
    found = laid_out(n)
    assert found.coordinates.shape == (n, 2) and np.isfinite(found.coordinates).all()
    assert np.isfinite(list(vars(found.place(planted(1)[0][0])).values())[:2]).all()


def test_a_prompt_stands_among_those_nearest_in_meaning():
    found, (vectors, topics) = laid_out(130), planted(130)
    itself = found.place(vectors[5])
    assert itself.nearest[0] == 5 and itself.similarity[0] == pytest.approx(1, abs=1e-2)
    np.testing.assert_allclose((itself.x, itself.y), found.coordinates[5], atol=0.05)
    other = found.place(np.eye(16, dtype=np.float32)[2])
    assert {topics[number] for number in other.nearest} == {2} and other.similarity == sorted(
        other.similarity, reverse=True
    )
    around = found.coordinates[other.nearest]
    assert (around.min(0) <= (other.x, other.y)).all() and ((other.x, other.y) <= around.max(0)).all()


def test_excerpts_are_short_and_fit_to_be_shown():
    vectors, topics = planted(2)
    found = lay_out(vectors, topics, ["  a\n\tb \x1b[31mred\x1b[0m\u202e " + "long " * 99, "\ud800 surrogate"], 0, True)
    assert found.excerpts[0].startswith("a b [31mred [0m long") and len(found.excerpts[0]) <= 160
    assert found.excerpts[1] == "surrogate"


# In an index


def test_a_map_is_saved_and_loaded(tmp_path):
    for texts in (["dots"] * 11 + ["né\n🚀"], None):
        folder = save(tmp_path / str(texts is None), prompt_map=replace(SMALL, excerpts=texts))
        loaded = SemanticIndex.load(folder)
        assert loaded.manifest.map.n_prompts == 12 and loaded.manifest.map.texts is (texts is not None)
        for name in ("coordinates", "clusters", "embeddings"):
            np.testing.assert_array_equal(getattr(loaded.map, name), getattr(SMALL, name))
        assert loaded.map.excerpts == (None if texts is None else ["dots"] * 11 + ["né 🚀"])


def test_an_index_of_an_earlier_release_loads_and_says_that_it_has_no_map(index, index_folder):
    assert "map" not in raw_manifest(index_folder) and index.manifest.map is None
    for ask in (lambda: index.map, lambda: index.place("How do stars form?"), index.plot):
        with pytest.raises(MissingMapError, match=r"has no map of its prompts, .*; build it anew with 'coreinfer-sim"):
            ask()


def test_excerpts_of_a_strangers_index_are_fit_to_be_shown(tmp_path):
    folder = save(tmp_path / "index", prompt_map=replace(SMALL, excerpts=["\x1b]0;title\x07\x9b2J"] * 12))
    assert SemanticIndex.load(folder).map.excerpts == ["]0;title 2J"] * 12


@pytest.mark.parametrize(
    "changed",
    [
        {"coordinates": np.zeros((11, 2), np.float32)},
        {"coordinates": np.zeros((12, 2), np.float64)},
        {"coordinates": np.full((12, 2), np.nan, np.float32)},
        {"clusters": np.full(12, 3, np.int32)},
        {"clusters": np.full(12, -1, np.int32)},
        {"embeddings": np.zeros((12, 5), np.float16)},
        {"excerpts": np.zeros(3, np.uint8)},
        {"excerpt_ends": np.arange(12, 0, -1).astype(np.int64)},
        {"surprise": np.zeros(1, np.float32)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_map_than_the_manifest_says_raises(tmp_path, changed):
    folder = save(tmp_path / "index", prompt_map=SMALL)
    replace_file(folder, MAP_FILE, to_bytes({**load((folder / MAP_FILE).read_bytes()), **changed}))
    with pytest.raises(IndexFormatError, match=r"map.safetensors.*expected"):
        _ = SemanticIndex.load(folder).map


def test_a_damaged_map_is_refused_when_it_is_read(tmp_path):
    folder = save(tmp_path / "index", prompt_map=SMALL)
    content = bytearray((folder / MAP_FILE).read_bytes())
    content[-1] ^= 1
    (folder / MAP_FILE).write_bytes(content)
    loaded = SemanticIndex.load(folder)
    with pytest.raises(IndexFormatError, match="has the checksum"):
        _ = loaded.map


@pytest.mark.parametrize(("field", "value"), [("n_prompts", 0), ("n_prompts", "12"), ("texts", 1), ("method", None)])
def test_a_manifest_that_misdescribes_its_map_is_refused(tmp_path, field, value):
    folder = save(tmp_path / "index", prompt_map=SMALL)
    raw = raw_manifest(folder)
    changed_at(raw, ("map", field))[field] = value
    rewrite(folder, raw)
    with pytest.raises(IndexFormatError):
        SemanticIndex.load(folder)
