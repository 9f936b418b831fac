"""A full disk is one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builds import FILES, LANGUAGE_MODEL_STAGE, StopAt, assert_nothing_loads, command, contents
from tiny_models import save_tiny_checkpoint

resource = pytest.importorskip("resource")


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Make every write beyond ``n_bytes`` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory) -> str:
    """A model whose statistics are larger than three centroids."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wide", intermediate_size=256)


@pytest.fixture(scope="module")
def wide(build, wide_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "index"
    build(out, model=wide_checkpoint)
    return out


BEFORE_SHARDS, AFTER_SHARDS = StopAt(LANGUAGE_MODEL_STAGE), StopAt(LANGUAGE_MODEL_STAGE, end=True)


@pytest.mark.parametrize(
    ("model", "before", "room"),
    [
        ("wide", None, lambda files: 100),
        ("wide", None, lambda files: 3000),
        ("wide", None, lambda files: 20_000),
        ("wide", BEFORE_SHARDS, lambda files: 2000),
        ("wide", AFTER_SHARDS, lambda files: 100),
        ("wide", AFTER_SHARDS, lambda files: files["neurons.safetensors"] - 1),
        ("tiny", AFTER_SHARDS, lambda files: files["neurons.safetensors"] + 1),
        ("tiny", AFTER_SHARDS, lambda files: files["centroids.faiss"] - 1),
    ],
    ids=["plan", "corpus", "embeddings", "shards", "index", "neurons", "centroids", "last byte of the centroids"],
)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    build, built, wide, tiny_checkpoint, wide_checkpoint, corpus, tmp_path, model, before, room
):
    whole, checkpoint = (wide, wide_checkpoint) if model == "wide" else (built, tiny_checkpoint)
    files = {name: (whole / name).stat().st_size for name in FILES}
    assert (files["neurons.safetensors"] > files["centroids.faiss"]) == (model == "wide")
    out = tmp_path / "index"
    if before is not None:
        with pytest.raises(KeyboardInterrupt):
            build(out, model=checkpoint, progress=before)
    kept = set(tmp_path.rglob("*.safetensors"))
    with largest_file(room(files)):
        run = command(corpus, checkpoint, out)
    assert run.exit_code == 1
    assert isinstance(run.exception, SystemExit), run.exception
    (error,) = [line for line in run.stderr.splitlines() if "Error:" in line]
    assert re.search(r"^Error: .*index.*; free some space .*run the same command again", error), error  # and where
    assert "Traceback" not in run.output
    assert not out.exists()
    assert_nothing_loads(tmp_path)
    assert kept <= set(tmp_path.rglob("*.safetensors"))  # finished shards are still there

    run = command(corpus, checkpoint, out)
    assert run.exit_code == 0, run.output
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_full_disk_stops_workers_in_one_sentence_too(build, built, tiny_checkpoint, corpus, tmp_path):
    """They find no room for the weights that they share, or for a shard's sums."""
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=BEFORE_SHARDS)
    with largest_file(2000):
        run = command(corpus, tiny_checkpoint, out, "--workers", "2")
    assert run.exit_code == 1 and re.search(r"Error: .*free some space .*run the same command again", run.stderr)
    run = command(corpus, tiny_checkpoint, out, "--workers", "2")
    assert run.exit_code == 0, run.output
    assert contents(out) == contents(built)
