"""Exact sums: what float32 leaves of them is kept beside it, in the smallest type, and read back to the last unit."""

from __future__ import annotations

import numpy as np
import pytest
from index_folder import raw_manifest, replace_file, rewrite, save
from safetensors.numpy import load
from safetensors.numpy import save as as_safetensors

from coreinfer_sim.base.errors import IndexFormatError, MissingSumsError
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import SUMS_FILE, CorpusInfo, SumsInfo
from coreinfer_sim.index.sums import Sums

SHAPE = (3, 2, 6)
OF = SumsInfo([CorpusInfo("a.jsonl", "1" * 64, 20, 200), CorpusInfo("b.jsonl", "2" * 64, 7, 100)])


def sums(most: int) -> Sums:
    random = np.random.default_rng(0)
    energy, activation = (random.integers(0, most, SHAPE) for _ in range(2))
    counts = random.integers(0, 300, SHAPE)
    return Sums(counts, energy, activation, np.linspace(1, -1, 27, dtype=np.float32))


@pytest.mark.parametrize(
    ("most", "kind"), [(2**20, np.int8), (2**30, np.int8), (2**38, np.int16), (2**50, np.int32), (2**60, np.int64)]
)
def test_sums_are_read_back_to_the_last_unit(tmp_path, most, kind):
    whole = sums(most)
    index = SemanticIndex.load(save(tmp_path / "index", statistics=whole, sums=OF))
    found = index.sums()
    for name in ("counts", "energy", "activation", "similarity"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert load((tmp_path / "index" / SUMS_FILE).read_bytes())["energy"].dtype == kind
    np.testing.assert_array_equal(index.statistics(1)[0], (whole.energy[1] * 2.0**-30).astype(np.float32))
    assert index.manifest.sums == OF


def test_an_index_without_sums_loads_and_says_how_to_get_them(tmp_path):
    index = SemanticIndex.load(save(tmp_path / "index"))
    assert index.manifest.sums is None and "sums" not in index.manifest.as_dict()
    with pytest.raises(MissingSumsError, match="holds no exact sums, .*build it anew with 'coreinfer-sim build-index'"):
        index.sums()


@pytest.mark.parametrize("change", [
    {"energy": np.zeros((3, 2, 5), np.int8)},
    {"similarity": np.zeros(26, np.float32)},
    {"more": np.zeros(3, np.int8)},
])  # fmt: skip
def test_sums_of_other_shapes_are_refused(tmp_path, change):
    folder = save(tmp_path / "index", statistics=sums(2**30), sums=OF)
    replace_file(folder, SUMS_FILE, as_safetensors({**load((folder / SUMS_FILE).read_bytes()), **change}))
    with pytest.raises(IndexFormatError, match=r"sums.safetensors holds .*, expected"):
        SemanticIndex.load(folder).sums()


def test_damage_is_found_when_sums_are_read(tmp_path):
    folder = save(tmp_path / "index", statistics=sums(2**30), sums=OF)
    content = (folder / SUMS_FILE).read_bytes()
    (folder / SUMS_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    index = SemanticIndex.load(folder)  # which needs none
    with pytest.raises(IndexFormatError, match="sums.safetensors has the checksum"):
        index.sums()
    (folder / SUMS_FILE).unlink()
    with pytest.raises(IndexFormatError, match="lacks sums.safetensors"):
        SemanticIndex.load(folder)


@pytest.mark.parametrize(
    "corpora", [[], [{"source": "a"}], "a", [{"source": "a", "sha256": "1", "n_sentences": 3, "n_tokens": 4}]]
)
def test_a_manifest_whose_corpora_do_not_add_up_is_refused(tmp_path, corpora):
    folder = save(tmp_path / "index", statistics=sums(2**30), sums=OF)
    raw = raw_manifest(folder)
    rewrite(folder, {**raw, "sums": {"corpora": corpora}})
    with pytest.raises(IndexFormatError, match="sums"):
        SemanticIndex.load(folder)
