"""What is saved is what is found, files of a wrong kind are refused, and nothing is unpickled."""

from __future__ import annotations

import ast
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_folder import (
    STATISTICS,
    clusters,
    manifest,
    raw_manifest,
    replace_file,
    save,
)
from safetensors.numpy import save as numpy_save

import coreinfer_sim
from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import sha256_of
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    HISTOGRAMS_FILE,
    INDEX_FILES,
    MANIFEST_FILE,
    NEURONS_FILE,
)
from coreinfer_sim.index.storage import save_index

PACKAGE = Path(coreinfer_sim.__file__).parent


def test_what_is_saved_is_loaded(index_folder):
    loaded = SemanticIndex.load(index_folder)
    assert loaded.clusters == clusters() and len(loaded) == 3
    assert loaded.name == str(index_folder)
    assert replace(loaded.manifest, files={}) == manifest()
    assert sorted(path.name for path in index_folder.iterdir()) == sorted([*INDEX_FILES, MANIFEST_FILE])
    for name, entry in loaded.manifest.files.items():
        assert entry.size == (index_folder / name).stat().st_size
        assert entry.sha256 == sha256_of(index_folder / name)


COUNTS = {"float32 v2": np.arange(3 * 5).reshape(3, 5), "Q8_0 high v2": np.full((3, 5), 70_000)}


def with_histograms(folder, histograms=None):
    folder.mkdir()
    parts = (np.eye(4, dtype=np.float32)[:3], clusters(), STATISTICS)
    save_index(folder, *parts, manifest(), COUNTS if histograms is None else histograms)
    return folder


def test_histograms_are_saved_and_loaded(tmp_path, index_folder):
    assert SemanticIndex.load(index_folder).histograms == {}
    folder = with_histograms(tmp_path / "another")
    loaded = SemanticIndex.load(folder)
    assert loaded.manifest.histograms == sorted(COUNTS) and HISTOGRAMS_FILE in loaded.manifest.files
    for name, counts in COUNTS.items():
        assert np.array_equal(loaded.histograms[name], counts)


def test_an_index_without_histograms_is_as_earlier_releases_wrote_it(index_folder):
    """Field by field, so that its checksum is theirs."""
    assert "histograms" not in raw_manifest(index_folder)


def test_histograms_that_are_damaged_are_refused_when_they_are_read(tmp_path):
    folder = with_histograms(tmp_path / "index")
    content = bytearray((folder / HISTOGRAMS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / HISTOGRAMS_FILE).write_bytes(content)
    loaded = SemanticIndex.load(folder)
    with pytest.raises(IndexFormatError, match="has the checksum"):
        _ = loaded.histograms


@pytest.mark.parametrize(
    "held",
    [
        {"float32 v2": COUNTS["float32 v2"]},
        {**COUNTS, "float32 v2": np.zeros((2, 5), np.int64)},
        {**COUNTS, "float32 v2": np.zeros(3, np.int64)},
        {**COUNTS, "float32 v2": np.zeros((3, 5), np.float32)},
    ],
)
def test_other_histograms_than_the_manifest_says_raise(tmp_path, held):
    folder = with_histograms(tmp_path / "index")
    replace_file(folder, HISTOGRAMS_FILE, numpy_save(held))
    with pytest.raises(IndexFormatError, match="expected"):
        _ = SemanticIndex.load(folder).histograms


def test_labels_and_exemplars_are_fit_to_be_shown(tmp_path):
    """Whoever wrote the index: escapes of terminals, and marks that turn the direction of writing."""
    named = [
        replace(c, label="\x1b[31mstars\x07", exemplars=["a\u202eb\r\n\x9b2Jc", "né 👩\u200d🚀"]) for c in clusters()
    ]
    for cluster in SemanticIndex.load(save(tmp_path / "index", of_clusters=named)).clusters:
        assert cluster.label == "[31mstars" and cluster.exemplars == ["a b 2Jc", "né 👩\u200d🚀"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\n"])
def test_an_id_may_hold_any_character(tmp_path, separator):
    named = [replace(cluster, exemplar_ids=[f"a{separator}b"]) for cluster in clusters()]
    assert SemanticIndex.load(save(tmp_path / "index", of_clusters=named)).clusters == named


def test_the_manifest_is_readable_json(index_folder):
    raw = raw_manifest(index_folder)
    assert raw["format_version"] == 2
    assert raw["settings"] == asdict(manifest().settings)


def test_a_cluster_without_quantiles_is_refused(index_folder):
    lines = [json.dumps({**asdict(cluster), "similarity_quantiles": {}}) for cluster in clusters()]
    replace_file(index_folder, CLUSTERS_FILE, "\n".join(lines).encode())
    with pytest.raises(IndexFormatError, match="cluster 0 has no similarity quantiles; "):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("shape", [(3, 2, 7), (3, 1, 6), (2, 2, 6), (3, 12), (3, 2, 6, 1)])
def test_a_statistic_of_another_shape_raises(tmp_path, name, shape):
    statistics = {**STATISTICS, name: np.zeros(shape, STATISTICS[name].dtype)}
    folder = save(tmp_path / "index", statistics=statistics)
    with pytest.raises(IndexFormatError, match=rf"{NEURONS_FILE}: {name} has the shape .*, expected \(3, 2, 6\)"):
        SemanticIndex.load(folder)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_missing_statistic_raises(tmp_path, name):
    folder = save(tmp_path / "index", statistics={k: v for k, v in STATISTICS.items() if k != name})
    with pytest.raises(IndexFormatError, match=NEURONS_FILE):
        SemanticIndex.load(folder)


def centroid_file(kind: str, path: Path) -> bytes:
    """Return a FAISS file that does not hold three flat centroids of four dimensions."""
    vectors = np.eye(4, dtype=np.float32)[:3]
    if kind == "garbage after the right beginning":
        size = (path / CENTROIDS_FILE).stat().st_size
        return b"IxFI" + b"\xff" * (size - 4)
    index = {
        "flat, by distance": lambda: faiss.IndexFlatL2(4),
        "graph": lambda: faiss.IndexHNSWFlat(4, 2, faiss.METRIC_INNER_PRODUCT),
        "fewer centroids": lambda: faiss.IndexFlatIP(4),
        "other dimensions in as many bytes": lambda: faiss.IndexFlatIP(6),
    }[kind]()
    if index.d == 6:
        vectors = np.eye(6, dtype=np.float32)[:2]
    index.add(vectors[:2] if kind == "fewer centroids" else vectors)
    faiss.write_index(index, str(path / "other.faiss"))
    return (path / "other.faiss").read_bytes()


@pytest.mark.parametrize(
    "kind",
    [
        "flat, by distance",
        "graph",
        "fewer centroids",
        "other dimensions in as many bytes",
        "garbage after the right beginning",
    ],
)
def test_centroids_of_another_kind_raise_although_the_checksum_is_right(index_folder, kind):
    replace_file(index_folder, CENTROIDS_FILE, centroid_file(kind, index_folder))
    with pytest.raises(IndexFormatError, match=CENTROIDS_FILE):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize(
    "of_clusters", [clusters(2), clusters(4), clusters()[::-1], []], ids=["2", "4", "order", "none"]
)
def test_other_clusters_than_the_manifest_counts_raise(tmp_path, of_clusters):
    folder = save(tmp_path / "index", of_clusters=of_clusters)
    with pytest.raises(IndexFormatError, match=CLUSTERS_FILE):
        SemanticIndex.load(folder)


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"id": 2}', json.dumps({**asdict(clusters()[2]), "surprise": 1})])
def test_a_cluster_that_cannot_be_read_raises_although_the_checksum_is_right(index_folder, line):
    lines = (index_folder / CLUSTERS_FILE).read_bytes().split(b"\n")[:2]
    replace_file(index_folder, CLUSTERS_FILE, b"\n".join([*lines, line.encode(), b""]))
    with pytest.raises(IndexFormatError, match=CLUSTERS_FILE):
        SemanticIndex.load(index_folder)


# No pickle


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [*INDEX_FILES, MANIFEST_FILE])
def test_nothing_in_an_index_is_unpickled(index_folder, tmp_path, name):
    trace = tmp_path / "unpickled"
    payload = pickle.dumps(Payload(trace))
    if name == MANIFEST_FILE:
        (index_folder / name).write_bytes(payload)
    else:
        replace_file(index_folder, name, payload)
    with pytest.raises(IndexFormatError, match=name):
        SemanticIndex.load(index_folder)
    assert not trace.exists()


def test_no_module_reads_or_writes_pickles():
    """But for what a build hands to its own workers, from memory to memory: that module opens no file for it."""
    handed = PACKAGE / "models" / "sharing.py"
    text = handed.read_text(encoding="utf-8")
    assert "_Reader(io.BytesIO(" in text and "rest = io.BytesIO()" in text
    opening = {"open", "read_bytes", "write_bytes", "fdopen", "mmap", "load", "loads"}
    called = {
        node.func.id if isinstance(node.func, ast.Name) else f"{ast.unparse(node.func.value)}.{node.func.attr}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    of_files = {name for name in called if name.rpartition(".")[2] in opening}
    assert of_files == {"_Reader(io.BytesIO(self.rest), _mapped(self.place)).load"}
    for path in {*PACKAGE.rglob("*.py")} - {handed}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            elif isinstance(node, ast.keyword):
                names = [node.arg or ""]
            forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "allow_pickle"}
            found = {name.split(".")[0] for name in names} & forbidden | {*names} & {"torch.load", "torch.save"}
            assert not found, f"{path.name}:{node.lineno}: {found}"
