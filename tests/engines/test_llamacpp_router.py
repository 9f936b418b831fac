"""The router of an export names its files, and an export that is not whole or of another index is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.engines.llamacpp.router import read_router, write_router


def test_what_was_written_is_read(wide_index, exported):
    router = read_router(exported, wide_index)
    assert router.modes == ["similarity", "global", "dense"]
    assert router.path(1) == exported / "cluster-0001.gguf" and router.path("dense") == exported / "dense.gguf"
    written = json.loads((exported / "router.json").read_text())
    assert np.allclose([each["centroid"] for each in written["clusters"]], wide_index.centroids, atol=1e-6)
    assert written["bytes"] == {path.name: path.stat().st_size for path in exported.glob("*.gguf")}


def test_a_set_that_was_not_exported_is_named(wide_index, exported, tmp_path):
    write_router(tmp_path, wide_index, {1: exported / "cluster-0001.gguf"}, 0.4, compensated=False)
    router = read_router(tmp_path, wide_index)
    assert router.modes == ["similarity"]
    for which, title in (("dense", "dense"), (0, "cluster 0")):
        with pytest.raises(ConfigError, match=f"lacks {title}"):
            router.path(which)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("size", 99, "another index"),
        ("file", "../secret.gguf", "GGUF files beside it"),
        ("file", "cluster-0000", "GGUF files beside it"),
    ],
)
def test_a_damaged_router_is_refused(wide_index, exported, tmp_path, name, value, says):
    with pytest.raises(ConfigError, match=r"has no router.json"):
        read_router(tmp_path, wide_index)
    content = json.loads((exported / "router.json").read_text())
    content["clusters"][0][name] = value
    (tmp_path / "router.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=says):
        read_router(tmp_path, wide_index)


def test_a_file_of_another_size_is_refused(wide_index, exported, tmp_path):
    (tmp_path / "router.json").write_text((exported / "router.json").read_text())
    (tmp_path / "dense.gguf").write_bytes(b"no model")
    with pytest.raises(ConfigError, match="has 8 bytes, export wrote"):
        read_router(tmp_path, wide_index)


def test_no_router_at_all(wide_index, tmp_path):
    (tmp_path / "router.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_router(tmp_path, wide_index)
