"""No damage to an index goes unnoticed."""

from __future__ import annotations

import pytest
from index_folder import (
    changed_at,
    manifest,
    raw_manifest,
    rewrite,
)

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    CLUSTERS_FILE,
    INDEX_FILES,
    MANIFEST_FILE,
    NEURONS_FILE,
)


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
    with pytest.raises(IndexFormatError, match="is a file, expected the folder"):
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
    "ranking": "surgeon",
    "budget": "uniform",
    "tokens": 9,
    "distil_tokens": 0,
    "n_kept": [3, 3, 3],
}


@pytest.mark.parametrize(
    "change",
    [
        {"keep_ratio": 1.0},
        {"keep_ratio": "0.5"},
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


@pytest.mark.parametrize(
    ("name", "value"), [("weights", "int3"), ("read_ratio", 0.0), ("read_ratio", 1.5), ("keep_ratio", 0.0)]
)
def test_a_profile_with_impossible_contents_raises(index_folder, name, value):
    """And one that a release without read ratios has written is read."""
    raw = raw_manifest(index_folder)
    earlier = {"keep_ratio": 0.5, "compensated": False, "max_increase": 0.05, "ratio": 1.0, "low": 1.0, "high": 1.0}
    raw["profile"] = {**earlier, "mlp_bytes": 1, "n_rows": 10}
    rewrite(index_folder, raw)
    found = SemanticIndex.load(index_folder).manifest.profile
    assert (found.read_ratio, found.weights, found.of_sets) == (1.0, "stored", True)
    raw["profile"][name] = value
    rewrite(index_folder, raw)
    with pytest.raises(IndexFormatError, match="profile"):
        SemanticIndex.load(index_folder)
    del raw["profile"]
    for profiles in ({"fast": {**earlier, "mlp_bytes": 1, "n_rows": 10, name: value}}, {"exact": earlier}, [1]):
        rewrite(index_folder, {**raw, "profiles": profiles})
        with pytest.raises(IndexFormatError, match="profiles"):
            SemanticIndex.load(index_folder)
