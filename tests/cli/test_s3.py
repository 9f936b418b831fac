"""Corpora and indexes in an S3 store that runs on this machine."""

from __future__ import annotations

import json

import datasets
import pytest
from commands import ONE_PROCESS, call, parsed, refused, succeeded

pytestmark = pytest.mark.slow
moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """Address of an empty bucket, served until the test ends; ``stop`` takes its server away."""
    import fsspec

    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("s3").clear_instance_cache()
    store = fsspec.filesystem("s3")
    store.mkdir("texts")
    yield store, server
    server.stop()


def test_build_extend_and_load_through_s3(bucket, tiny_checkpoint, tmp_path):
    store, server = bucket
    for part in range(3):
        rows = [
            {"prompt": f"How do {noun} form, case {n}?"} for n in range(part, part + 3) for noun in ("stars", "laws")
        ]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{part}.parquet")
        store.put_file(str(tmp_path / f"{part}.parquet"), f"texts/prompts/{part}.parquet")
    build = ["build-index", "s3://texts/prompts", "--model", tiny_checkpoint, "--out", "s3://texts/index", *ONE_PROCESS]
    succeeded(*build, "--clusters", 2)
    store.pipe_file(
        "texts/more.jsonl", b"".join(json.dumps({"prompt": f"Why {n}?"}).encode() + b"\n" for n in range(4))
    )
    succeeded("extend", "s3://texts/index", "s3://texts/more.jsonl", "--workers", 1)
    assert parsed("info", "s3://texts/index")["corpus"]["n_sentences"] == 10 + 4
    # the store goes away
    server.stop()
    for command in (
        ["info", "s3://texts/index"],
        ["extend", "s3://texts/index", "s3://texts/more.jsonl"],
        [*build[:-2], "--force"],
    ):
        refused(call(*command), "s3://texts/.* cannot be reached .*check the address, the network and your credentials")
