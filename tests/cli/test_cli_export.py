"""`coreinfer-sim export` writes models and their router, goes on where it was broken off, and refuses what cannot be."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from exportable import logits_of, stock_logits

from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.export.gguf import export_gguf
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_writes_models_and_their_router(wide_index, wide_checkpoint, tmp_path):
    out = tmp_path / "out"
    given = (wide_index.name, "--model", wide_checkpoint, "--keep-ratio", 0.5, "--out", out)
    result = run("export", *given, "--cluster", "all", "--cluster", "global", "--manifest", "--json")
    assert result.exit_code == 0, result.output
    router = json.loads((out / "router.json").read_text())
    n_clusters = len(router["clusters"])
    assert [each["path"] for each in json.loads(result.stdout)] == [
        str(out / name) for name in (*(f"cluster-{c:04d}" for c in range(n_clusters)), "global", "router.json")
    ]
    assert router["fallback"] == "global" and router["clusters"][1]["file"] == "cluster-0001"
    loaded = SemanticIndex.load(wide_index.name)
    assert np.allclose([each["centroid"] for each in router["clusters"]], loaded.centroids, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "cluster-0001")
    ids = tokenizer("Stars form", return_tensors="pt")["input_ids"]
    _, logits = stock_logits(out / "cluster-0001", ids)
    lm = load_model(wide_checkpoint)
    selection = IndexSets(loaded, 128 / 192).of_cluster(1)  # 96 neurons, rounded up
    assert torch.allclose(logits, logits_of(lm, selection, ids), atol=1e-3)
    written = (out / "cluster-0000/model.safetensors").stat().st_mtime_ns
    again = run("export", f"{given[0]}/", *given[1:], "--cluster", "all")  # the same index in other words
    assert again.exit_code == 0 and f"{n_clusters} of {n_clusters} models there already" in again.output
    assert (out / "cluster-0000/model.safetensors").stat().st_mtime_ns == written
    other = run("export", *given[:3], "--keep-ratio", 0.4, "--out", out, "--cluster", 0)
    assert other.exit_code == 1 and "holds something else than was requested" in other.output
    (out / "cluster-0000/coreinfer_sim.json").unlink()
    other = run("export", *given, "--cluster", 0)
    assert other.exit_code == 1 and "holds something else than was requested" in other.output
    assert run("export", *given, "--cluster", 0, "--force").exit_code == 0
    assert (out / "cluster-0000/model.safetensors").stat().st_mtime_ns > written
    assert not list(out.glob(".*"))


def test_a_broken_off_export_goes_on(wide_index, wide_checkpoint, tmp_path, monkeypatch):
    given = ("export", wide_index.name, "--model", wide_checkpoint, "--keep-ratio", 0.5)
    given = (*given, "--format", "gguf", "--type", "f16", "--cluster", "all", "--manifest", "--out", tmp_path)
    real, written = export_gguf, []

    def broken_off(*arguments):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(arguments[3])
        real(*arguments)

    monkeypatch.setattr("coreinfer_sim.export.gguf.export_gguf", broken_off)
    result = run(*given)
    assert result.exit_code == 130 and "run the same command again to go on" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["cluster-0000.gguf"]
    monkeypatch.undo()
    first = (tmp_path / "cluster-0000.gguf").stat()
    result = run(*given)
    assert result.exit_code == 0 and "1 of 3 models there already" in result.output
    assert (tmp_path / "cluster-0000.gguf").stat().st_mtime_ns == first.st_mtime_ns
    router = json.loads((tmp_path / "router.json").read_text())
    assert router["bytes"] == {path.name: path.stat().st_size for path in tmp_path.glob("*.gguf")}
    (tmp_path / "cluster-0001.gguf").write_bytes(b"something else")
    result = run(*given)
    assert result.exit_code == 1 and "cluster-0001.gguf exists already and holds something else" in result.output


def test_what_cannot_be_exported(wide_index, wide_checkpoint, tmp_path, monkeypatch):
    given = ("export", wide_index.name, "--model", wide_checkpoint, "--out", tmp_path / "out")
    result = run(*given, "--cluster", 99)
    assert result.exit_code == 1 and "expected 0 to" in result.output
    assert run(*given, "--cluster", "x").exit_code == 2
    assert run(*given, "--cluster", 0, "--type", "q8_0").exit_code == 2
    for ratio in ("1.7", "0", "-1", "nan"):
        result = run(*given, "--cluster", 0, "--keep-ratio", ratio)
        assert result.exit_code == 1 and "expected a number above 0 and at most 1" in result.output
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(*given, "--cluster", 0, "--format", "gguf", "--type", "q4_k_m")
    assert result.exit_code == 1 and "llama-quantize, which is not on the PATH" in result.output
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10))
    result = run(*given, "--cluster", 0)
    assert result.exit_code == 1 and "are free in" in result.output
    assert not list((tmp_path / "out").iterdir())
