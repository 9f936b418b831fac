"""The index on disk: what is saved is what is found, and no damage goes unnoticed."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from tiny_models import save_tiny_checkpoint, tiny_model

import coreinfer_sim
from coreinfer_sim.base.errors import ConfigError, IndexFormatError, IndexMismatchError
from coreinfer_sim.base.files import sha256_of
from coreinfer_sim.base.settings import Score
from coreinfer_sim.index.index import Cluster, Match, SemanticIndex, remove_index, save_parts
from coreinfer_sim.index.manifest import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    INDEX_FILES,
    MANIFEST_FILE,
    NEURONS_FILE,
    CorpusInfo,
    EncoderInfo,
    Manifest,
    ModelInfo,
    SettingsInfo,
    manifest_checksum,
)
from coreinfer_sim.models.loading import LanguageModel, load_model, tokenizer_hash
from coreinfer_sim.models.mlps import find_mlps, weight_sketch

PACKAGE = Path(coreinfer_sim.__file__).parent
PROMPTS = ["How do stars form?", "Why does bread rise?", "What do judges decide in court?"]

# Three clusters, two recorded layers, six neurons; only the first layer's ranks are worked out by hand below.
ENERGY = np.zeros((3, 2, 6), np.float32)
ENERGY[0] = [[5, 1, 3, 3, 3, 0], [1, 2, 3, 4, 5, 6]]
ENERGY[1] = [[0, 4, 0, 0, 0, 9], [6, 5, 4, 3, 2, 1]]
COUNTS = np.zeros((3, 2, 6), np.uint8)
COUNTS[0] = [[200, 2, 0, 1, 2, 1], [0, 0, 0, 0, 0, 0]]
COUNTS[1] = [[100, 0, 0, 250, 0, 0], [0, 0, 0, 0, 0, 0]]
ACTIVATION = np.zeros((3, 2, 6), np.float32)
ACTIVATION[0] = [[0, 9, 1, 2, 1, 7], [1, 1, 1, 2, 1, 1]]
ACTIVATION[1] = [[3, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
STATISTICS = {"counts": COUNTS, "energy": ENERGY, "activation": ACTIVATION}
RANKS = {  # neurons of layer 1, best first
    (0, "energy"): [0, 3, 2, 4, 1, 5],  # 2, 3 and 4 tie at 3: first the larger activation, then the lower id
    (0, "paper"): [0, 1, 4, 5, 3, 2],  # 1 and 4 tie at 2, 5 and 3 at 1: the larger activation
    (1, "energy"): [5, 1, 0, 4, 2, 3],  # 0, 2, 3 and 4 tie at 0
    (2, "energy"): [0, 1, 2, 3, 4, 5],  # everything ties, in the activation too
    (None, "energy"): [5, 1, 0, 3, 4, 2],  # sums [5, 5, 3, 3, 3, 9] and [3, 9, 1, 2, 2, 7]
    (None, "paper"): [0, 3, 1, 4, 5, 2],  # sums [300, 2, 0, 251, 2, 1]: more than a byte holds
}


def clusters(n: int = 3) -> list[Cluster]:
    return [
        Cluster(c, 10 - c, 100, f"label {c}", [f"prompt „{c}“", "b"], [f"id-{c}", "y"], {"0": 0.25, "1": 0.75})
        for c in range(n)
    ]


def manifest(**sections: Any) -> Manifest:
    """Return a manifest that fits the parts above; sections replace its own."""
    return Manifest(
        **{
            "format_version": 2,
            "versions": {"coreinfer-sim": "0.1.0"},
            "model": ModelInfo(
                name="some-model",
                revision=None,
                family="Llama",
                dtype="float32",
                n_layers=3,
                d_model=8,
                d_ff=6,
                weight_sketch=[[0.5] * 32] * 3,
                tokenizer_sha256="0" * 64,
                activation_site="input of down_proj",
            ),
            "encoder": EncoderInfo("sentence-transformers/all-MiniLM-L6-v2", 4, True, "cosine", [0.0] * 8),
            "corpus": CorpusInfo("prompts.jsonl", "1" * 64, 27, 300),
            "settings": SettingsInfo(3, 0.4, 0.4, 0.5, 0, [1, 2], 16, 64, 1),
            "compensation": [],
            "profile": None,
            "files": {},
            **sections,
        }
    )


def save(
    folder: Path,
    *,
    centroids: np.ndarray | None = None,
    of_clusters: list[Cluster] | None = None,
    statistics: dict[str, np.ndarray] | None = None,
    **sections: Any,
) -> Path:
    """Save an index; every part may be another."""
    folder.mkdir(parents=True)
    save_parts(
        folder,
        np.eye(4, dtype=np.float32)[:3] if centroids is None else centroids,
        clusters() if of_clusters is None else of_clusters,
        STATISTICS if statistics is None else statistics,
        manifest(**sections),
    )
    return folder


def rewrite(folder: Path, raw: Any) -> None:
    """Put another manifest in place."""
    if isinstance(raw, dict) and isinstance(raw.get("sha256"), str):
        raw = {**raw, "sha256": manifest_checksum(raw)}
    (folder / MANIFEST_FILE).write_text(json.dumps(raw), encoding="utf-8")


def raw_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Put another file in place, its size and checksum in the manifest right."""
    (folder / name).write_bytes(content)
    raw = raw_manifest(folder)
    raw["files"][name] = {"size": len(content), "sha256": sha256_of(folder / name)}
    rewrite(folder, raw)


@pytest.fixture
def index_folder(tmp_path) -> Path:
    """A sound index."""
    return save(tmp_path / "index")


@pytest.fixture
def index(index_folder) -> SemanticIndex:
    return SemanticIndex.load(index_folder)


# Save, load, look up


def test_what_is_saved_is_loaded(index_folder):
    loaded = SemanticIndex.load(index_folder)
    assert loaded.clusters == clusters() and len(loaded) == 3
    assert loaded.name == str(index_folder)
    assert replace(loaded.manifest, files={}) == manifest()
    assert sorted(path.name for path in index_folder.iterdir()) == sorted([*INDEX_FILES, MANIFEST_FILE])
    for name, entry in loaded.manifest.files.items():
        assert entry.size == (index_folder / name).stat().st_size
        assert entry.sha256 == sha256_of(index_folder / name)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\n"])
def test_an_id_may_hold_any_character(tmp_path, separator):
    named = [replace(cluster, exemplar_ids=[f"a{separator}b"]) for cluster in clusters()]
    assert SemanticIndex.load(save(tmp_path / "index", of_clusters=named)).clusters == named


def test_the_manifest_is_readable_json(index_folder):
    raw = raw_manifest(index_folder)
    assert raw["format_version"] == 2
    assert raw["settings"] == asdict(manifest().settings)


def test_lookup_is_the_same_before_and_after_saving(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    centroids = encoder.encode(PROMPTS)
    folder = save(tmp_path / "index", centroids=centroids, encoder=info)
    before = SemanticIndex(manifest(encoder=info), centroids, clusters(), STATISTICS, encoder=encoder)
    after = SemanticIndex.load(folder, encoder)
    queries = [*PROMPTS, "Where do planets come from?"]
    assert after.lookup(queries, k=3) == before.lookup(queries, k=3)
    for cluster in (0, 1, 2, None):
        for score in Score:
            one, other = (i.core_neurons(cluster, 0.5, score, "1:") for i in (before, after))
            assert one.keys() == other.keys() == {1, 2}
            assert all(torch.equal(one[layer], other[layer]) for layer in one)


def test_lookup_finds_the_nearest_clusters_best_first(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    centroids = encoder.encode(PROMPTS)
    index = SemanticIndex.load(save(tmp_path / "index", centroids=centroids, encoder=info), encoder)
    for number, prompt in enumerate(PROMPTS):
        (match,) = index.lookup(prompt)
        assert (match.cluster, match.label) == (number, f"label {number}")
        assert match.similarity == pytest.approx(1, abs=1e-5)
    query = "Where do planets come from?"
    matches = index.lookup(query, k=3)
    cosine = centroids @ encoder.encode([query])[0]
    assert [match.cluster for match in matches] == np.argsort(-cosine).tolist()
    assert [match.similarity for match in matches] == pytest.approx(np.sort(cosine)[::-1].tolist(), abs=1e-6)


def test_a_list_of_prompts_is_looked_up_like_each_prompt(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    index = SemanticIndex.load(save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info), encoder)
    together, apart = index.lookup(PROMPTS, k=2), [index.lookup(prompt, k=2) for prompt in PROMPTS]
    assert [[m.cluster for m in row] for row in together] == [[m.cluster for m in row] for row in apart]
    np.testing.assert_allclose(
        [[m.similarity for m in row] for row in together], [[m.similarity for m in row] for row in apart], atol=1e-5
    )
    assert isinstance(index.lookup(PROMPTS[0])[0], Match) and isinstance(index.lookup(PROMPTS[:1])[0], list)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_is_a_number_of_clusters(index, k):
    with pytest.raises(ConfigError, match=rf"k is {k}, expected 1 to 3, the number of clusters"):
        index.lookup_embeddings(np.eye(4)[:1], k)


def test_the_encoder_of_the_manifest_is_loaded_when_needed(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    index = SemanticIndex.load(save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info))
    assert index.lookup(PROMPTS[2])[0].cluster == 2


def test_an_index_may_let_go_of_its_encoder_after_each_lookup(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe())
    index = SemanticIndex.load(save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info))
    kept = index.lookup(PROMPTS)
    assert "encoder" in vars(index)
    index.keeps_encoder = False
    for _ in range(2):
        assert index.lookup(PROMPTS) == kept
        assert "encoder" not in vars(index)


def test_an_encoder_of_other_dimensions_is_refused(index_folder, encoder):
    with pytest.raises(
        IndexMismatchError, match=r"gives 384 dimensions, .* was built with 4; use sentence-transformers/"
    ):
        SemanticIndex.load(index_folder, encoder).lookup("stars")


def test_an_encoder_that_embeds_otherwise_is_refused(tmp_path, encoder):
    info = EncoderInfo(encoder.name, encoder.dimension, True, "cosine", [v + 0.1 for v in encoder.probe()])
    folder = save(tmp_path / "index", centroids=encoder.encode(PROMPTS), encoder=info)
    with pytest.raises(IndexMismatchError, match="embeds the test sentence as"):
        SemanticIndex.load(folder, encoder).lookup("stars")


# Core neurons


@pytest.mark.parametrize(("cluster", "score"), RANKS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_core_neurons_are_the_best_by_score_then_activation_then_id(index, cluster, score, n):
    ids = index.core_neurons(cluster, n / 6, score, "1:")
    assert list(ids) == [1, 2]
    assert ids[1].dtype == torch.int64
    assert ids[1].tolist() == sorted(RANKS[cluster, score][:n])


@pytest.mark.parametrize(("keep_ratio", "n"), [(0.01, 1), (1 / 6, 1), (0.49, 2), (0.5, 3), (0.84, 5), (1.0, 6)])
def test_the_keep_ratio_is_chosen_at_load_time(index, keep_ratio, n):
    assert [len(ids) for ids in index.core_neurons(0, keep_ratio, layers="1:").values()] == [n, n]


def test_energy_and_the_gamma_of_the_build_are_the_defaults(index):
    assert index.core_neurons(0, layers="1")[1].tolist() == sorted(RANKS[0, "energy"][:3])


def test_every_layer_has_its_own_core_neurons(index):
    ids = index.core_neurons(0, 0.5, layers="1:")
    assert ids[1].tolist() == [0, 2, 3] and ids[2].tolist() == [3, 4, 5]
    assert index.core_neurons(0, 0.5, "paper", "2")[2].tolist() == [0, 1, 3]  # all counts tie, 3 is the most active


@pytest.mark.parametrize(("layers", "expected"), [("1:", [1, 2]), ("1", [1]), ("-1:", [2]), ("2:9", [2])])
def test_layers_are_those_of_the_model(index, layers, expected):
    assert list(index.core_neurons(0, layers=layers)) == expected


def test_a_layer_that_was_not_recorded_is_refused(index):
    with pytest.raises(ConfigError, match=r"layers \[0\] were not recorded in .* holds \[1, 2\]; .*--layers"):
        index.core_neurons(0)


@pytest.mark.parametrize("cluster", [-1, 3])
def test_a_cluster_that_is_not_there_is_refused(index, cluster):
    with pytest.raises(ConfigError, match=f"the cluster is {cluster}, expected 0 to 2"):
        index.core_neurons(cluster, layers="1:")


@pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.01])
def test_a_keep_ratio_out_of_range_is_refused(index, keep_ratio):
    with pytest.raises(ConfigError, match=f"keep ratio is {keep_ratio}, expected a number above 0"):
        index.core_neurons(0, keep_ratio, layers="1:")


def test_a_selection_says_where_it_came_from(index):
    selection = index.selection(Match(1, 0.75, "label 1"), 0.5, layers="1")
    assert (selection.mode, selection.cluster, selection.similarity) == ("similarity", 1, 0.75)
    assert {layer: ids.tolist() for layer, ids in selection.ids.items()} == {1: sorted(RANKS[1, "energy"][:3])}


# Damage


def test_a_cluster_without_quantiles_is_refused(index_folder):
    lines = [json.dumps({**asdict(cluster), "similarity_quantiles": {}}) for cluster in clusters()]
    replace_file(index_folder, CLUSTERS_FILE, "\n".join(lines).encode())
    with pytest.raises(IndexFormatError, match="cluster 0 has no similarity quantiles; "):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", [*INDEX_FILES, MANIFEST_FILE])
@pytest.mark.parametrize("where", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_raises(index_folder, name, where, bit):
    path = index_folder / name
    content = bytearray(path.read_bytes())
    content[round(where * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(IndexFormatError, match=name):
        SemanticIndex.load(index_folder)


def test_one_flipped_bit_raises_anywhere_in_the_manifest(index_folder):
    path = index_folder / MANIFEST_FILE
    content = path.read_bytes()
    unnoticed = []
    for place in range(0, len(content), 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            SemanticIndex.load(index_folder)
        except IndexFormatError:
            continue
        unnoticed.append(content[max(0, place - 25) : place + 5].decode())
    assert not unnoticed, f"{len(unnoticed)} places, for example {unnoticed[:5]}"


def test_an_edited_manifest_raises(index_folder):
    path = index_folder / MANIFEST_FILE
    text = path.read_text(encoding="utf-8")
    assert text.count('"gamma": 0.5') == 1
    path.write_text(text.replace('"gamma": 0.5', '"gamma": 0.6'), encoding="utf-8")
    with pytest.raises(IndexFormatError, match=r"manifest.json has another checksum .*coreinfer-sim build-index"):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", [*INDEX_FILES, MANIFEST_FILE])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_raises(index_folder, name, kept):
    path = index_folder / name
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(IndexFormatError, match=name):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", [*INDEX_FILES, MANIFEST_FILE])
def test_bytes_at_the_end_raise(index_folder, name):
    with (index_folder / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(IndexFormatError, match=name):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", [*INDEX_FILES, MANIFEST_FILE])
def test_a_missing_file_raises(index_folder, name):
    (index_folder / name).unlink()
    with pytest.raises(IndexFormatError, match=rf"(lacks|has no) {name}, expected .*coreinfer-sim build-index"):
        SemanticIndex.load(index_folder)


def test_a_folder_in_place_of_a_file_raises(index_folder):
    (index_folder / NEURONS_FILE).unlink()
    (index_folder / NEURONS_FILE).mkdir()
    with pytest.raises(IndexFormatError):
        SemanticIndex.load(index_folder)


def test_what_is_no_folder_raises(index_folder, tmp_path):
    with pytest.raises(IndexFormatError, match="there is no folder"):
        SemanticIndex.load(tmp_path / "nowhere")
    with pytest.raises(IndexFormatError, match="there is no folder"):
        SemanticIndex.load(index_folder / MANIFEST_FILE)


@pytest.mark.parametrize("version", [0, 1, -1, 1.5, "1", None, True, [1]])
def test_an_unknown_format_version_raises(index_folder, version):
    rewrite(index_folder, {**raw_manifest(index_folder), "format_version": version})
    with pytest.raises(
        IndexFormatError,
        match=rf"format version {version!r}, this release reads version 2; .*build-index"
        if not isinstance(version, list)
        else "format version",
    ):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("raw", [[], "manifest", 1, None, {}])
def test_a_manifest_of_another_kind_raises(index_folder, raw):
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError, match="no readable manifest" + (".*it states no format" if raw == {} else "")):
        SemanticIndex.load(index_folder)


def test_a_manifest_in_another_encoding_raises(index_folder):
    (index_folder / MANIFEST_FILE).write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(IndexFormatError, match="no readable manifest"):
        SemanticIndex.load(index_folder)


FIELDS = [
    *((name,) for name in manifest().as_dict() if name != "format_version"),
    *(
        (section, name)
        for section in ("model", "encoder", "corpus", "settings")
        for name in manifest().as_dict()[section]
    ),
    *(("files", name, part) for name in INDEX_FILES for part in ("size", "sha256")),
]


def changed_at(raw: dict[str, Any], field: tuple[str, ...]) -> dict[str, Any]:
    """Return the part of a manifest that holds a field."""
    for name in field[:-1]:
        raw = raw[name]
    return raw


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_a_missing_field_raises(index_folder, field):
    raw = raw_manifest(index_folder)
    del changed_at(raw, field)[field[-1]]
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError, match="lacks or misspells a field"):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("section", [(), ("model",), ("encoder",), ("corpus",), ("settings",), ("files", NEURONS_FILE)])
def test_an_unknown_field_raises(index_folder, section):
    raw = raw_manifest(index_folder)
    changed_at(raw, (*section, "surprise"))["surprise"] = 1
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError, match="surprise"):
        SemanticIndex.load(index_folder)


RIGHT = [
    (("versions",), {"a": 1}),
    (("model", "revision"), None),
    (("encoder", "normalised"), True),
    (("profile",), None),
]
WRONG = [(field, value) for field in FIELDS for value in ({"a": 1}, True, None) if (field, value) not in RIGHT]


@pytest.mark.parametrize(
    ("field", "value"), WRONG, ids=lambda part: ".".join(part) if isinstance(part, tuple) else None
)
def test_a_field_of_a_wrong_type_raises(index_folder, field, value):
    raw = raw_manifest(index_folder)
    changed_at(raw, field)[field[-1]] = value
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError):
        SemanticIndex.load(index_folder)


FITTED = {
    "keep_ratio": 0.5,
    "rank": None,
    "bypass_rank": 0,
    "ranking": "surgeon",
    "budget": "uniform",
    "tokens": 9,
    "distil_tokens": 0,
    "distil_from": None,
    "n_kept": [3, 3, 3],
}


@pytest.mark.parametrize(
    "change",
    [
        {"keep_ratio": 1.0},
        {"keep_ratio": "0.5"},
        {"rank": 0},
        {"bypass_rank": -1},
        {"n_kept": [3, 3]},
        {"n_kept": [3, 3, 7]},
        {"n_kept": [3, 3, True]},
        {"surprise": 1},
        {},  # sound, but the files that it promises are not listed
    ],
)
def test_compensation_that_cannot_be_raises(index_folder, change):
    rewrite(index_folder, {**raw_manifest(index_folder), "compensation": [{**FITTED, **change}]})
    with pytest.raises(IndexFormatError, match="compensation|misspells"):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("settings", "layers", ["1", "2"]),
        ("settings", "layers", [1, 3]),
        ("settings", "layers", [2, 1]),
        ("settings", "layers", [1, 1]),
        ("settings", "layers", [-2, 1]),
        ("model", "weight_sketch", [[0.5] * 32] * 2),
        ("model", "weight_sketch", [[0.5] * 31] * 3),
        ("model", "weight_sketch", [["a"] * 32] * 3),
        ("encoder", "probe", ["a"] * 8),
        ("encoder", "probe", []),
        ("settings", "alpha", float("nan")),
        ("settings", "gamma", 1.5),
    ],
)
def test_a_field_with_impossible_contents_raises(index_folder, section, name, value):
    raw = raw_manifest(index_folder)
    raw[section][name] = value
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", ["extra.bin", "../outside", "/etc/hostname"])
def test_a_further_entry_among_the_files_raises(index_folder, name):
    raw = raw_manifest(index_folder)
    raw["files"][name] = raw["files"][CLUSTERS_FILE]
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError, match="lists the files"):
        SemanticIndex.load(index_folder)


@pytest.mark.parametrize("name", INDEX_FILES)
def test_a_missing_entry_among_the_files_raises(index_folder, name):
    raw = raw_manifest(index_folder)
    del raw["files"][name]
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError, match="lists the files"):
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


def test_an_index_that_is_being_removed_does_not_load(index_folder, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_index(index_folder)
    with pytest.raises(IndexFormatError, match=f"has no {MANIFEST_FILE}"):
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
    for path in [*PACKAGE.rglob("*.py")]:
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


# The model


def index_of(language_model: LanguageModel) -> SemanticIndex:
    """Return an index that says that it was built from a model."""
    layer = language_model.layers[0]
    info = ModelInfo(
        name="the-model",
        revision=None,
        family=layer.family.name,
        dtype="float32",
        n_layers=len(language_model.layers),
        d_model=layer.d_model,
        d_ff=layer.d_ff,
        weight_sketch=weight_sketch(language_model.layers),
        tokenizer_sha256=tokenizer_hash(language_model.tokenizer),
        activation_site="input of down_proj",
    )
    made = manifest(model=info)
    return SemanticIndex(made, np.eye(4, dtype=np.float32)[:3], clusters(), STATISTICS, name="my-index")


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint) -> LanguageModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def model_index(language_model) -> SemanticIndex:
    return index_of(language_model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_index_belongs_to_its_model_in_every_dtype(model_index, tiny_checkpoint, dtype):
    again = load_model(tiny_checkpoint, dtype)
    model_index.check_model(again.layers, tokenizer_hash(again.tokenizer))


def test_the_same_family_with_other_weights_is_refused(model_index, tmp_path):
    other = load_model(save_tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(IndexMismatchError, match=r"\d+ of 96 sampled weights .* my-index .*coreinfer-sim build-index"):
        model_index.check_model(other.layers)


@pytest.mark.parametrize("layer", [0, 2])
def test_one_other_layer_is_refused(model_index, tiny_checkpoint, layer):
    tuned = load_model(tiny_checkpoint)
    with torch.no_grad():
        tuned.layers[layer].output.weight.mul_(1.1)
    with pytest.raises(IndexMismatchError, match="of 96 sampled weights"):
        model_index.check_model(tuned.layers)


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ({"num_hidden_layers": 2}, "Llama with 2 layers, d_model 32, d_ff 48"),
        ({"intermediate_size": 64}, "Llama with 3 layers, d_model 32, d_ff 64"),
    ],
)
def test_another_shape_is_refused_by_both_shapes(model_index, tmp_path, overrides, shape):
    other = load_model(save_tiny_checkpoint(tmp_path / "other", **overrides))
    with pytest.raises(
        IndexMismatchError, match=f"the model is {shape}, but .* Llama with 3 layers, d_model 32, d_ff 48"
    ):
        model_index.check_model(other.layers)


def test_another_family_of_the_same_shape_is_refused(model_index):
    with pytest.raises(IndexMismatchError, match="the model is Mistral with 3 layers, d_model 32, d_ff 48"):
        model_index.check_model(find_mlps(tiny_model("mistral")))


def test_another_tokenizer_is_refused(model_index, language_model, tiny_checkpoint):
    tokenizer = load_model(tiny_checkpoint).tokenizer
    assert tokenizer_hash(tokenizer) == tokenizer_hash(language_model.tokenizer)
    tokenizer.add_tokens(["stars"])
    with pytest.raises(IndexMismatchError, match=r"the tokenizer's vocabulary .* use the tokenizer of the-model"):
        model_index.check_model(language_model.layers, tokenizer_hash(tokenizer))
