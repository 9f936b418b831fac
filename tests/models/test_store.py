"""The neuron-major store: what it holds, damage, and one process that makes it."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from coreinfer_sim.base.errors import StoreError
from coreinfer_sim.base.files import LOCK_FILE
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.models.checkpoint import Checkpoint
from coreinfer_sim.models.store import NeuronStore, PartSource, StoreShape, make_store, open_or_make


def random_store(path: Path, n_layers: int = 2, d_ff: int = 50, d_model: int = 8):
    """Write a gated store of random weights and return it with what it should hold, [n_layers, d_ff, 3, d_model]."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(n_layers, d_ff, 3, d_model, generator=generator)
    tensors = {}
    for layer in range(n_layers):
        tensors[f"{layer}.gate"] = expected[layer, :, 0].contiguous()
        tensors[f"{layer}.up"] = expected[layer, :, 1].contiguous()
        tensors[f"{layer}.down"] = expected[layer, :, 2].T.contiguous()
    folder = path.parent / "source"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    sources = [[PartSource(f"{n}.gate"), PartSource(f"{n}.up"), PartSource(f"{n}.down", True)] for n in range(n_layers)]
    shape = StoreShape(n_layers, d_ff, 3, d_model, "float32")
    return Checkpoint(folder), sources, shape, expected


@pytest.fixture
def written(tmp_path):
    checkpoint, sources, shape, expected = random_store(tmp_path / "x.neurons")
    make_store(tmp_path / "x.neurons", checkpoint, sources, shape, Progress())
    return tmp_path / "x.neurons", expected


@pytest.mark.parametrize("ids", [[], [7], [0, 1, 2, 9, 10, 49], [49, 3, 3, 4, 0], list(range(50))])
def test_neurons_come_in_the_order_of_their_ids(written, ids):
    path, expected = written
    store = NeuronStore(path)
    wanted = torch.tensor(ids, dtype=torch.int64)
    for layer in store.layers:
        out = torch.empty(len(ids), 3, 8)
        assert layer.read_neurons(wanted, out) is out
        assert torch.equal(out, expected[layer.number, wanted])
        assert torch.equal(layer.read_range(3, 20), expected[layer.number, 3:20])
    store.verify()
    store.close()


def test_many_small_tasks_read_the_same(written, monkeypatch):
    path, expected = written
    monkeypatch.setattr("coreinfer_sim.models.store.TASK_BYTES", 200)  # two neurons
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 8, 10, 11, 12, 40, 49, 48])
    assert torch.equal(NeuronStore(path).layers[1].read_neurons(ids), expected[1, ids])


@pytest.mark.parametrize("ids", [[-1], [50], [0, 99]])
def test_neurons_that_are_not_there(written, ids):
    with pytest.raises(StoreError, match="expected 0 to 49"):
        NeuronStore(written[0]).layers[0].read_neurons(torch.tensor(ids))


def test_an_out_of_another_shape_is_refused(written):
    layer = NeuronStore(written[0]).layers[0]
    for out in (torch.empty(2, 3, 8), torch.empty(1, 3, 8, dtype=torch.bfloat16), torch.empty(1, 8, 3).mT):
        with pytest.raises(StoreError, match="expected torch.float32"):
            layer.read_neurons(torch.tensor([1]), out)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def scribble(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(120)
        file.write(b"\0\0")


def other_version(path: Path) -> None:
    with path.open("r+b") as file:
        header = file.read(1 << 16).replace(b'"format_version": 1', b'"format_version": 9')
        file.seek(0)
        file.write(header)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bytes, expected"), (scribble, "no readable header"), (other_version, "format version 9, expected 1")],
)
def test_a_damaged_store_is_refused_with_what_mends_it(written, damage, message):
    damage(written[0])
    with pytest.raises(StoreError, match=f"{message}.*(?s:.*)made anew"):
        NeuronStore(written[0])


def test_a_changed_weight_shows_in_the_checksums(written):
    path, _ = written
    with path.open("r+b") as file:
        file.seek((1 << 16) + 4096 * 2 + 40)
        file.write(b"\1")
    with pytest.raises(StoreError, match="layer 1 .*checksum"):
        NeuronStore(path).verify()


def test_a_store_that_shrinks_while_open(written):
    store = NeuronStore(written[0])
    os.truncate(written[0], 1 << 16)
    with pytest.raises(StoreError, match="cannot be read"):
        store.layers[0].read_neurons(torch.tensor([3]))
    with pytest.raises(StoreError, match="cannot be read"):
        store.layers[0].read_range(0, 2)


def test_an_interrupted_creation_leaves_nothing_that_loads(tmp_path, monkeypatch):
    path = tmp_path / "x.neurons"
    checkpoint, sources, shape, expected = random_store(path)
    read_rows = Checkpoint.read_rows

    def stop(self, name, *rest):
        if name.startswith("1."):  # the second layer
            raise KeyboardInterrupt
        return read_rows(self, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            make_store(path, checkpoint, sources, shape, Progress())
    assert not path.exists()
    assert not list(tmp_path.glob(".*.part"))
    killed = tmp_path / ".x.neurons.999999999.part"
    killed.touch()
    make_store(path, checkpoint, sources, shape, Progress())
    assert not killed.exists()
    assert torch.equal(NeuronStore(path).layers[0].read_range(0, 50), expected[0])


def test_two_processes_make_a_store_once(tmp_path):
    other_made = tmp_path / "x.neurons"
    checkpoint, sources, shape, expected = random_store(other_made)
    make_store(other_made, checkpoint, sources, shape, Progress())
    path = tmp_path / "cache" / "x.neurons"
    path.parent.mkdir()
    half_written = path.with_name(f".{path.name}.7.part")  # in two containers two processes may have this number
    half_written.touch()
    waits = threading.Event()

    class Heard(Progress):
        def say(self, text):
            if "Another process is writing to" in text:
                waits.set()

    found = []
    with FileLock(path.with_name(LOCK_FILE)):
        thread = threading.Thread(target=lambda: found.append(open_or_make(path, checkpoint, sources, shape, Heard())))
        thread.start()
        assert waits.wait(60)
        assert half_written.exists() and not found
        other_made.rename(path)
    thread.join(60)
    assert half_written.exists()  # nothing was written again
    assert torch.equal(found[0].layers[0].read_range(0, 50), expected[0])


def test_a_full_disk_is_said_before_writing(tmp_path, monkeypatch):
    checkpoint, sources, shape, _ = random_store(tmp_path / "x.neurons")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="1000 B free, expected .*COREINFER_SIM_CACHE"):
        make_store(tmp_path / "x.neurons", checkpoint, sources, shape, Progress())
