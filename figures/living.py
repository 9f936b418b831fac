"""Indexes that grow, and what surrounds the language model at scale: clusters of a million prompts, lookups, an S3 store."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from figures.record import at_least, at_most, exactly, record
from figures.table import DEMO_MODEL, ROOT, Given, figure
from figures.tools import coreinfer, output_of

FILE = "figures-scale.json"
_DIMENSION, _N_TOPICS = 384, 512
_WRITTEN_AT_ONCE = 1 << 16
_CLUSTERED = """
import json, sys, threading, time
import faiss, numpy as np, sklearn.cluster
sys.path.insert(0, sys.argv[1])
from coreinfer_sim.index.clustering import cluster_embeddings, n_trained, quantiles_of
from coreinfer_sim.index.prompt_map import lay_out
n, k = int(sys.argv[3]), int(sys.argv[4])

def own_bytes():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

embeddings = np.memmap(sys.argv[2], np.float32, "r", shape=(n, 384))
before, most, done = own_bytes(), 0, False

def watch():
    global most
    while not done:
        most = max(most, own_bytes())
        time.sleep(0.02)

watcher = threading.Thread(target=watch)
watcher.start()
begin = time.perf_counter()
found = cluster_embeddings(embeddings, k, 0)
seconds = time.perf_counter() - begin
begin = time.perf_counter()
[quantiles_of(found.similarity[members]) for members in found.members()]
lay_out(embeddings, found.assignment, [""] * n, 0, False)
rest = time.perf_counter() - begin
done = True
watcher.join()
similarity = float(found.similarity.mean())
print(json.dumps({"bytes": most - before, "seconds": seconds, "rest": rest, "similarity": similarity,
                  "clusters": len(found.centroids), "trained": n_trained(n, k)}))
"""


def _topics(n: int, random: np.random.Generator, centres: np.ndarray, spread: float) -> np.ndarray:
    """Return unit vectors around given ones, as far from them as ``spread`` times their length, float32 [n, 384]."""
    noise = random.standard_normal((n, _DIMENSION), np.float32) * np.float32(spread / _DIMENSION**0.5)
    vectors = centres[random.integers(0, len(centres), n)] + noise
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _fields(random: np.random.Generator) -> np.ndarray:
    vectors = random.standard_normal((_N_TOPICS, _DIMENSION), np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@figure(FILE, "2 GB of disk", "10 minutes", timed=True, rows=1_000_000)
def clusters(given: Given) -> None:
    """Memory and time of everything but the language model: synthetic embeddings, 1,024 clusters, and their map."""
    random = np.random.default_rng(0)
    fields = _topics(4096, random, _fields(random), 0.8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.f32"
        with path.open("wb") as file:
            for begin in range(0, given.rows, _WRITTEN_AT_ONCE):
                file.write(_topics(min(_WRITTEN_AT_ONCE, given.rows - begin), random, fields, 0.8).tobytes())
        command = [sys.executable, "-c", _CLUSTERED, str(ROOT), str(path), str(given.rows), "1024"]
        found: dict[str, Any] = json.loads(output_of(command).splitlines()[-1])
    what = f"{given.rows:,} embeddings × {_DIMENSION}, 1,024 clusters"
    record(f"{what}: memory above the memory map", found["bytes"] / 1e9, "GB at its peak", at_most(2), **found)
    record(f"{what}: k-means on {found['trained']:,} of them, and all assigned", found["seconds"], "s")
    record(f"{what}: quantiles, nearest prompts and map", found["rest"], "s")


@figure(FILE, "", "3 minutes", timed=True, rows=2000)
def lookups(given: Given) -> None:
    """Time and recall of lookups among 65,536 clusters, without the embedding."""
    import faiss

    from coreinfer_sim.index.clustering import faiss_index, nearest, searcher

    random = np.random.default_rng(0)
    centroids = _topics(1 << 16, random, _fields(random), 0.9)
    begin = time.perf_counter()
    index = searcher(centroids)
    made = time.perf_counter() - begin
    for spread, what in ((0.7, "prompts near a centroid"), (1.2, "prompts far from every centroid")):
        prompts = _topics(given.rows, random, centroids, spread)
        wanted = nearest(faiss_index(centroids), prompts, 1)[1][:, 0]
        seconds, numbers = [], []
        for prompt in prompts:
            begin = time.perf_counter()
            numbers.append(int(nearest(index, prompt[None], 1)[1][0, 0]))
            seconds.append(time.perf_counter() - begin)
        of_type = {
            "type": type(index).__name__,
            "threads": faiss.omp_get_max_threads(),
            "seconds_to_make": round(made, 2),
        }
        name = f"lookup among 65,536 clusters, {what}"
        record(f"{name}: time", 1000 * float(np.median(seconds)), "ms, median", at_most(1), **of_type)
        record(f"{name}: recall of exact search", float((np.array(numbers) == wanted).mean()), "share", at_least(0.99))


@figure(FILE, "a model", "10 minutes on two cores", model=DEMO_MODEL, name=None, rows=200)
def extended(given: Given) -> None:
    """An index that was extended, and one that was merged of two, beside one build over all texts with the same centroids."""
    from coreinfer_sim.index.index import SemanticIndex

    lines = (ROOT / "demo" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[: given.rows]
    middle = len(lines) * 2 // 3
    with tempfile.TemporaryDirectory() as folder:
        place = {name: f"{folder}/{name}" for name in ("old", "new", "all", "extended", "merged")}
        for name, part in {"old": lines[:middle], "new": lines[middle:], "all": lines}.items():
            Path(f"{place[name]}.jsonl").write_text("".join(part), encoding="utf-8")
        build = [
            "build-index",
            "--model",
            given.model,
            "--prompt-column",
            "prompt",
            "--template",
            "{prompt}\n{completion}",
        ]
        for name in ("old", "new", "all"):
            clusters = ["--clusters", 6] if name == "old" else ["--set", f"build.centroids={place['old']}"]
            output_of(coreinfer(*build, f"{place[name]}.jsonl", "--out", place[name], *clusters, "--quiet"))
        of_texts = ["--prompt-column", "prompt", "--template", "{prompt}\n{completion}", "--quiet"]
        output_of(coreinfer("extend", place["old"], f"{place['new']}.jsonl", "-o", place["extended"], *of_texts))
        output_of(coreinfer("merge", place["old"], place["new"], "-o", place["merged"], "--quiet"))
        whole = SemanticIndex.load(place["all"]).sums()
        for name in ("extended", "merged"):
            sums = SemanticIndex.load(place[name]).sums()
            for what in ("counts", "energy", "activation"):
                ours, theirs = getattr(sums, what), getattr(whole, what)
                record(
                    f"{given.name}: {what} of an index that was {name}, other than those of one build over all texts",
                    int((ours != theirs).sum()),
                    f"of {ours.size:,} sums",
                    exactly(0),
                )


@contextmanager
def _s3() -> Iterator[dict[str, str]]:
    """Serve S3 on this machine by moto; yield the variables by which s3fs finds it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which would print every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        yield {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    finally:
        server.stop()


@figure(FILE, "pip install 'moto[server]' s3fs", "3 minutes")
def store(_given: Given) -> None:
    """A build from an S3 store into it, killed once and begun again, and the index loaded from there."""
    sys.path.insert(0, str(ROOT / "tests"))
    import fsspec
    from tiny_models import save_tiny_checkpoint

    nouns = [f"{noun} {place}" for noun in ("stars", "loaves", "courts") for place in ("here", "there", "elsewhere")]
    text = " ".join(nouns * 20)
    rows = "".join(
        json.dumps({"prompt": f"What of {noun}, case {n}?", "text": text}) + "\n" for n in range(40) for noun in nouns
    )
    with tempfile.TemporaryDirectory() as folder, _s3() as variables:
        os.environ |= {**variables, "COREINFER_SIM_CACHE": folder}
        files = fsspec.filesystem("s3")
        files.mkdir("texts")
        files.pipe_file("texts/prompts.jsonl", rows.encode())
        model = save_tiny_checkpoint(Path(folder) / "model")
        build = [
            "build-index",
            "s3://texts/prompts.jsonl",
            "--model",
            model,
            "--clusters",
            3,
            "--workers",
            1,
            "--threads",
            1,
        ]
        build += ["--set", "build.shard_size=4", "--template", "{prompt} {text}", "--quiet"]
        # 1) undisturbed
        output_of(coreinfer(*build, "--out", "s3://texts/one"))
        # 2) killed with some shards on disk, and begun again
        killed = subprocess.Popen(coreinfer(*build, "--out", "s3://texts/other"), cwd=ROOT)
        while killed.poll() is None and len(list(Path(folder).glob("indexes/*.build/shards/[0-9]*.safetensors"))) < 5:
            time.sleep(0.01)
        killed.kill()
        was_killed = killed.wait() < 0
        finished = len(list(Path(folder).glob("indexes/*.build/shards/[0-9]*.safetensors")))
        output_of(coreinfer(*build, "--out", "s3://texts/other"))
        # 3) both are the same, and load
        files.invalidate_cache()
        same = all(
            files.cat_file(f"texts/one/{name}") == files.cat_file(f"texts/other/{name}")
            for name in ("neurons.safetensors", "sums.safetensors", "centroids.faiss", "clusters.jsonl")
        )
        shown = json.loads(output_of(coreinfer("info", "s3://texts/other", "--json")))
    holds = was_killed and same and shown["corpus"]["n_sentences"] == len(nouns) * 40
    record(
        "S3 store on this machine: a build from it into it, killed and begun again, is that of an undisturbed one, and loads",
        "yes" if holds else "no",
        f"killed after {finished} shards",
        exactly("yes"),
    )
