"""An index that is loaded is never mixed with another one, whatever happens to its files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from index_folder import STATISTICS, manifest, save
from safetensors.numpy import save_file

from coreinfer_sim.base.errors import ConfigError, IndexFormatError
from coreinfer_sim.index.compensated import LayerCompensation, load_compensated, save_compensated
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import NEURONS_FILE, FileInfo, ProfileInfo
from coreinfer_sim.index.verified import StoredArray, VerifiedFile

PROFILE = ProfileInfo(0.5, False, 0.1, 1.0, 1.0, 1.0, 1, 10)


@pytest.fixture
def other(tmp_path) -> Path:
    """An index with the same shapes, of other neurons."""
    statistics = {name: np.ascontiguousarray(values[:, :, ::-1]) for name, values in STATISTICS.items()}
    return save(tmp_path / "other", statistics=statistics)


def overwrite(target: Path, source: Path) -> None:
    """Write over the bytes of a file, as cp and rsync --inplace do."""
    with target.open("r+b") as file:
        file.write(source.read_bytes())
        file.truncate()


def cut(target: Path, _: Path) -> None:
    os.truncate(target, 40)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_statistics_that_were_overwritten_are_never_used(index_folder, other, change):
    index = SemanticIndex.load(index_folder)
    for path in index_folder.iterdir():
        change(path, other / path.name)
    for cluster in (0, 2, None):
        with pytest.raises(IndexFormatError, match=f"{NEURONS_FILE} was changed while it was in use, .*; start again"):
            index.core_neurons(cluster, layers="1:")
    assert len(index.lookup_embeddings(np.eye(4)[:1], 3)[0]) == 3


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_an_index_that_was_replaced_or_removed_as_a_whole_goes_on(index_folder, other, change):
    index, before = SemanticIndex.load(index_folder), SemanticIndex.load(index_folder)
    wanted = {cluster: before.core_neurons(cluster, layers="1:") for cluster in (0, 1, None)}
    shutil.rmtree(index_folder)
    if change == "replaced":
        other.rename(index_folder)
    for cluster, ids in wanted.items():
        found = index.core_neurons(cluster, layers="1:")
        assert all(torch.equal(found[layer], ids[layer]) for layer in ids)


def test_the_working_directory_may_change(index_folder, monkeypatch):
    monkeypatch.chdir(index_folder.parent)
    index = SemanticIndex.load(index_folder.name)
    monkeypatch.chdir("/")
    index.write_profiles({"balanced": PROFILE})
    assert SemanticIndex.load(index_folder).manifest.profile == PROFILE


def test_a_profile_is_not_written_into_another_index(index_folder, tmp_path):
    index = SemanticIndex.load(index_folder)
    shutil.rmtree(index_folder)
    save(index_folder, settings=manifest().settings.__class__(3, 0.4, 0.4, 0.7, 0, [1, 2], 16, 64, 1))
    with pytest.raises(IndexFormatError, match="holds another index than the one that was loaded"):
        index.write_profiles({"balanced": PROFILE})
    assert SemanticIndex.load(index_folder).manifest.profile is None


def test_an_index_that_cannot_be_written_says_so(index_folder, monkeypatch):
    index = SemanticIndex.load(index_folder)
    index.check_writable()

    def refused(**_):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ConfigError, match=r"manifest.json cannot be written into .* \(Permission denied\)"):
        index.check_writable()


@pytest.mark.parametrize("change", [overwrite, cut, lambda path, _: path.unlink()])
def test_a_compensated_set_that_was_changed_is_never_used(tmp_path, change):
    ids, paths = {0: torch.arange(4)}, [tmp_path / "one", tmp_path / "other"]
    for number, path in enumerate(paths):
        save_compensated(path, ids, {0: LayerCompensation(torch.full((6,), number + 1.0), torch.ones(6, 4))})
    _, repairs = load_compensated(paths[0], 6, 1)
    assert repairs[0].bias.tolist() == [1.0] * 6
    change(*paths)
    with pytest.raises(IndexFormatError, match="one (was changed while it was in use|cannot be read)"):
        _ = repairs[0]
    with pytest.raises(IndexFormatError):
        load_compensated(paths[0], 6, 1, FileInfo(1, "0" * 64))


def test_pieces_of_a_large_file_are_those_of_the_file(tmp_path):
    content = np.random.default_rng(0).bytes(1_000_003)
    (tmp_path / "file").write_bytes(content)
    for stays_open in (True, False):
        file = VerifiedFile(tmp_path / "file", stays_open=stays_open)
        for begin, end in (
            (0, 1),
            (0, len(content)),
            (262_143, 262_145),
            (262_144, 524_288),
            (999_999, 1_000_003),
            (5, 5),
        ):
            assert bytes(file.read(begin, end)) == content[begin:end]


def test_rows_are_those_of_the_array(tmp_path):
    values = np.arange(5 * 3 * 70_000, dtype="<u4").reshape(5, 3, 70_000)
    save_file({"values": values, "more": np.ones(3, np.int8).view(np.uint8)}, tmp_path / "file")
    file = VerifiedFile(tmp_path / "file")
    array = StoredArray(file, file.tensors()["values"])
    assert len(array) == 5 and array.shape == values.shape
    assert all(np.array_equal(array[number], values[number]) for number in range(5))
    assert [row[0, 0] for row in array] == values[:, 0, 0].tolist()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{}",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, header):
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(IndexFormatError, match="file cannot be read"):
        VerifiedFile(tmp_path / "file").tensors()
