"""Corpora and indexes at addresses that fsspec opens."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from corpora import ROWS, as_csv, as_json, as_jsonl, as_parquet, read

from coreinfer_sim.base.errors import BuildError, ConfigError, CorpusError, IndexFormatError, UnreachableError
from coreinfer_sim.base.stores import RemoteFile
from coreinfer_sim.index import remote
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import MANIFEST_FILE


@pytest.fixture
def memory():
    """The store ``memory://``, empty before and after."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def put(memory, path: str | Path, address: str) -> str:
    memory.pipe_file(address, Path(path).read_bytes())
    return address


def as_gzip(rows, folder):
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(Path(as_jsonl(rows, folder)).read_bytes()))
    return str(path)


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv, as_gzip, as_parquet], ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_file_at_an_address_reads_as_on_disk(write, kind, memory, tmp_path):
    path = write(ROWS, tmp_path)
    address = f"file://{path}" if kind == "file" else put(memory, path, f"memory://texts/{Path(path).name}")
    assert read(address) == read(path)


def test_a_folder_at_an_address_reads_as_on_disk(memory, tmp_path):
    for number, row in enumerate(ROWS):
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"train-{number}.parquet")
        put(memory, tmp_path / f"train-{number}.parquet", f"memory://texts/deep/train-{number}.parquet")
        put(memory, tmp_path / f"train-{number}.parquet", f"memory://texts/.hidden/train-{number}.parquet")
    assert read("memory://texts") == read(tmp_path) == read(f"file://{tmp_path}")
    assert len(read("memory://texts")[0]) == 3


def test_parquet_at_an_address_is_read_as_a_stream(memory, tmp_path, monkeypatch):
    """Only the groups of rows that are needed pass through memory."""
    prompts = [random.Random(n).randbytes(500).hex() for n in range(4000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": prompts}), tmp_path / "large.parquet", row_group_size=200, use_dictionary=False
    )
    address = put(memory, tmp_path / "large.parquet", "memory://large.parquet")
    opened, n_read = RemoteFile.open, []

    def counting(self, mode="rb"):
        file = opened(self, mode)
        inner = file.read
        file.read = lambda n=-1: n_read.append(n) or inner(n)
        return file

    monkeypatch.setattr(RemoteFile, "open", counting)
    found, _ = read(address, limit=100)
    assert len(found) == 100 and max(n_read) < (tmp_path / "large.parquet").stat().st_size / 4 and min(n_read) >= 0


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("at_address", [False, True])
def test_a_truncated_parquet_file_in_the_middle_is_named(at_address, memory, tmp_path):
    for number, row in enumerate(ROWS):
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{number}.parquet")
    truncated(tmp_path / "1.parquet")
    with pytest.raises(
        CorpusError, match=r"1\.parquet is cut short or damaged.* \(.*\), expected a whole Parquet file; fetch"
    ):
        read(f"file://{tmp_path}" if at_address else tmp_path)


def test_what_cannot_be_reached_is_one_sentence(memory):
    with pytest.raises(
        CorpusError, match="there is nothing at memory://nowhere.jsonl, expected a corpus; check the address and"
    ):
        read("memory://nowhere.jsonl")
    with pytest.raises(
        UnreachableError, match=r"nosuch://x.jsonl cannot be reached \(.*nosuch.*\), expected an address"
    ):
        read("nosuch://x.jsonl")
    with (
        pytest.raises(UnreachableError, match=r"http://127.0.0.1:9/x.jsonl cannot be reached|there is nothing at http"),
        RemoteFile("http://127.0.0.1:9/x.jsonl").open() as file,
    ):
        file.read()


def at_memory(memory, folder: Path, address: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            put(memory, path, f"{address}/{path.relative_to(folder)}")
    return address


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_index_at_an_address_loads_and_is_copied_once(memory, wide_index, cache):
    address = at_memory(memory, wide_index.folder, "memory://indexes/wide")
    loaded = SemanticIndex.load(address)
    assert loaded.name == address and loaded.manifest == wide_index.manifest
    memory.rm_file("memory://indexes/wide/neurons.safetensors")  # the copy does
    assert SemanticIndex.load(address).core_neurons(0).keys() == wide_index.core_neurons(0).keys()
    with pytest.raises(ConfigError, match="memory://indexes/wide lies at an address, .*; copy it first"):
        loaded.check_writable()


def test_a_damaged_index_at_an_address_is_refused(memory, wide_index, cache):
    with pytest.raises(IndexFormatError, match=r"memory://none has no manifest.json, expected a finished index"):
        SemanticIndex.load("memory://none")
    address = at_memory(memory, wide_index.folder, "memory://indexes/wide")
    content = memory.cat_file(f"{address}/neurons.safetensors")
    memory.pipe_file(f"{address}/neurons.safetensors", content[:-1] + b"?")
    with pytest.raises(IndexFormatError, match="checksum"):
        SemanticIndex.load(address)
    memory.pipe_file(f"{address}/neurons.safetensors", content)
    assert SemanticIndex.load(address).manifest == wide_index.manifest  # as nothing damaged was kept
    raw = json.loads(memory.cat_file(f"{address}/{MANIFEST_FILE}"))
    memory.pipe_file(f"{address}/{MANIFEST_FILE}", json.dumps({**raw, "files": {"../../x": {}}}).encode())
    with pytest.raises(IndexFormatError):
        SemanticIndex.load(address)
    assert [path.name for path in cache.rglob("x")] == []


def test_an_index_is_put_at_its_address_the_manifest_last(memory, wide_index, cache, monkeypatch):
    order = []
    whole = RemoteFile.put
    monkeypatch.setattr(RemoteFile, "put", lambda self, source: (order.append(self.name), whole(self, source)))

    def write(place: Path) -> None:
        place.mkdir()
        for path in wide_index.folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())

    with remote.put_at("memory://made/index", force=False) as place:
        write(place)
    assert order[-1] == MANIFEST_FILE and not place.exists()
    assert SemanticIndex.load("memory://made/index").manifest == wide_index.manifest
    with (
        pytest.raises(BuildError, match="memory://made/index holds an index already, .* replace it with force"),
        remote.put_at("memory://made/index", force=False),
    ):
        pass

    def lost(self, source):
        raise UnreachableError("the store is gone.")

    monkeypatch.setattr(RemoteFile, "put", lost)
    with (
        pytest.raises(UnreachableError, match="the store is gone. The index is whole, and lies in .*to-"),
        remote.put_at("memory://made/other", force=False) as place,
    ):
        write(place)
    assert SemanticIndex.load(place).manifest == wide_index.manifest


def test_commands_take_addresses(memory, corpus_at, cache):
    from commands import ONE_PROCESS, parsed, refused, call, succeeded  # noqa: I001

    corpus, model = corpus_at
    out = "memory://built/index"
    built = succeeded("build-index", corpus, "--model", model, "--clusters", 2, "--out", out, *ONE_PROCESS)
    assert f"{out} is memory of this process, and is gone when the command ends" in built.stderr
    assert parsed("info", out)["corpus"]["source"] == "prompts.jsonl"
    more = "memory://texts/more.jsonl"
    memory.pipe_file(more, b"".join(json.dumps({"prompt": f"Why {n}?"}).encode() + b"\n" for n in range(3)))
    succeeded("extend", out, more, "--workers", 1)
    assert parsed("info", out)["corpus"]["n_sentences"] == 12
    refused(call("build-index", corpus, "--model", model, "--out", out), "holds an index already")
    assert [path.name for path in (cache / "indexes").iterdir() if path.name.startswith("to-")] == []


@pytest.fixture
def corpus_at(memory, tiny_checkpoint):
    rows = [{"prompt": f"How do {noun} form, case {n}?"} for n in range(3) for noun in ("stars", "loaves", "laws")]
    memory.pipe_file("memory://texts/prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return "memory://texts/prompts.jsonl", tiny_checkpoint
