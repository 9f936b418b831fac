"""The pool opens no more than its limit allows, and never closes what must stay open."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.engines.llamacpp.pool import ModelPool

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")


def test_the_pool_keeps_its_limit(exported, tmp_path):
    dense, clusters = exported / "dense.gguf", sorted(exported.glob("cluster-*.gguf"))
    size = dense.stat().st_size
    pool = ModelPool(int(2.1 * size), str(tmp_path), context=64)
    for path in clusters * 2:
        pool.get(dense, beside=path)
        assert pool.get(path, beside=dense).path == path
        assert pool.n_bytes <= 2.1 * size and {dense, path} <= {*pool.paths}
    pool.close()
    assert pool.paths == [] and pool.n_bytes == 0


def test_a_limit_that_is_too_small_is_refused(exported, tmp_path):
    dense, cluster = exported / "dense.gguf", exported / "cluster-0000.gguf"
    pool = ModelPool(dense.stat().st_size, str(tmp_path), context=64)
    with pytest.raises(ConfigError, match=r"must be open at a time \(cluster-0000.gguf beside dense.gguf\)"):
        pool.get(cluster, beside=dense)
    assert pool.get(cluster).path == cluster
