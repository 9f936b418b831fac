"""The stages that make statistics, each of which leaves its result in the build folder, so that a killed build goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_sim.base.files import write_atomic, write_json
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.processes import Report
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.base.rows import CorpusReport, Row, load_rows, read_corpus
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building.folder import SHARDS_FOLDER
from coreinfer_sim.building.promise import hold_out
from coreinfer_sim.building.shards import PartialSums, cut_into_shards, run_shard
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
from coreinfer_sim.fitting.workers import CLUSTERING_FILE, SENTENCES_FILE, Workers, read_clustering
from coreinfer_sim.index.clustering import (
    Clustering,
    assign,
    choose_n_clusters,
    cluster_embeddings,
    n_restarts,
    n_trained,
)
from coreinfer_sim.index.encoder import SentenceEncoder
from coreinfer_sim.index.prompt_map import MOST_PROMPTS, PromptMap, lay_out
from coreinfer_sim.models.prompts import rendered

_REPORT_FILE = "corpus-report.json"
EMBEDDINGS_FILE = "embeddings.f32"
"""Of a build: float32 [n_sentences, dimension], row after row, as far as it has come."""
_EMBEDDED_AT_ONCE = 128


@dataclass(frozen=True)
class DrawnCorpus:
    """The sentences that a build has drawn from its corpus."""

    sentences: list[Row]
    report: CorpusReport


def draw(folder: Path, corpus: CorpusConfig, tokenizer: Any, progress: Progress) -> DrawnCorpus:
    """Draw the sentences from the corpus into the build folder."""
    path, report_path = folder / SENTENCES_FILE, folder / _REPORT_FILE
    if not report_path.exists():
        drawn, report = read_corpus(
            corpus,
            lambda texts: tokenizer(texts, verbose=False)["input_ids"],
            partial(rendered, tokenizer, "the model"),
        )
        progress.start("Reading the corpus", corpus.limit, "prompts")

        def write(part: Path) -> None:
            _write_rows(drawn, part, progress)

        try:
            write_atomic(path, write)
        finally:
            progress.finish()
        report.n_held_out = hold_out(load_rows(path), folder)
        write_json(report_path, report.as_dict())
    report = CorpusReport(**json.loads(report_path.read_text(encoding="utf-8")))
    progress.say(f"Corpus: {report}.")
    return DrawnCorpus(load_rows(path), report)


def _write_rows(rows: Iterable[Row], path: Path, progress: Progress) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            progress.advance(1)


def embed(folder: Path, sentences: Sequence[Row], encoder: SentenceEncoder, progress: Progress) -> np.ndarray:
    """Embed the prompts, block by block, into a file that goes on growing; return it, mapped, [n_sentences, dimension]."""
    path, n, row_bytes = folder / EMBEDDINGS_FILE, len(sentences), 4 * encoder.dimension
    done = path.stat().st_size // row_bytes if path.exists() else 0
    done = n if done >= n else done // _EMBEDDED_AT_ONCE * _EMBEDDED_AT_ONCE  # a block that was cut short is made anew
    progress.start("Embedding", n, "prompts", done)
    try:
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(done * row_bytes)
            file.seek(done * row_bytes)
            for begin in range(done, n, _EMBEDDED_AT_ONCE):
                block = [sentence.prompt for sentence in sentences[begin : begin + _EMBEDDED_AT_ONCE]]
                file.write(np.ascontiguousarray(encoder.encode(block), np.float32).tobytes())
                file.flush()
                give_back_memory()
                progress.advance(len(block))
    finally:
        progress.finish()
    return np.memmap(path, np.float32, "r", shape=(n, encoder.dimension))


def cluster(
    folder: Path,
    embeddings: np.ndarray,
    config: BuildConfig,
    progress: Progress,
    centroids: np.ndarray | None = None,
) -> Clustering:
    """Cluster embeddings [n_sentences, dimension] by k-means or by given centroids, or read what that gave before."""
    path = folder / CLUSTERING_FILE
    if not path.exists() and centroids is not None:
        write_atomic(path, partial(_save_arrays, vars(assign(centroids, embeddings))))
    if not path.exists():
        n_clusters = config.clusters
        if isinstance(n_clusters, str):
            n_clusters = _choose_n_clusters(embeddings, config.seed, progress)
        n = n_trained(len(embeddings), n_clusters)
        if n < len(embeddings):
            progress.say(f"k-means is trained on {n:,} of {counted(len(embeddings), 'prompt')}, drawn at random.")
        progress.start("Clustering", n_restarts(len(embeddings), n_clusters), "starts")
        try:
            clustering = cluster_embeddings(embeddings, n_clusters, config.seed, progress.advance)
        finally:
            progress.finish()
        write_atomic(path, partial(_save_arrays, vars(clustering)))
    return read_clustering(folder)


def draw_map(
    embeddings: np.ndarray,
    clustering: Clustering,
    sentences: Sequence[Row],
    config: BuildConfig,
    progress: Progress,
) -> PromptMap:
    """Make the map of the prompts, whose embeddings are [n_sentences, dimension]; this takes seconds, and is not kept."""
    progress.start("Drawing the map", min(len(sentences), MOST_PROMPTS), "prompts")
    try:
        prompts = [sentence.prompt for sentence in sentences]
        found = lay_out(embeddings, clustering.assignment, prompts, config.seed, config.texts)
        progress.advance(len(found))
    finally:
        progress.finish()
    return found


def _choose_n_clusters(embeddings: np.ndarray, seed: int, progress: Progress) -> int:
    progress.start("Comparing numbers of clusters", None, "candidates")

    def report(k: int, silhouette: float) -> None:
        progress.advance(1)
        progress.say(f"  {k:4d} clusters: silhouette {silhouette:.4f} {'▇' * max(0, round(100 * silhouette))}")

    try:
        best, _ = choose_n_clusters(embeddings, seed, report)
    finally:
        progress.finish()
    progress.say(f"Chosen: {best} clusters.")
    return best


class RecordShards:
    """The job that runs the language model over shards of the corpus; it reports tokens."""

    def __init__(self, corpus: ClusteredCorpus) -> None:
        """Cut the corpus into shards."""
        n_tokens = np.array([sentence.n_tokens for sentence in corpus.sentences])
        self.shards = cut_into_shards(corpus.clustering.assignment, n_tokens, corpus.config.shard_size)
        """The numbers of each shard's sentences."""

    def result(self, corpus: ClusteredCorpus, number: int) -> Path:
        """Return where a shard's sums will be."""
        return corpus.folder / SHARDS_FOLDER / f"{number:06d}.safetensors"

    def run(self, corpus: ClusteredCorpus, number: int, report: Report) -> None:
        """Leave the sums of one shard on disk."""
        shard = self.shards[number]
        run_shard(corpus, shard).save(self.result(corpus, number))
        report(sum(corpus.sentences[i].n_tokens for i in shard))


def record(workers: Workers) -> None:
    """Run the language model over every shard that is not finished yet."""
    corpus = workers.corpus
    (corpus.folder / SHARDS_FOLDER).mkdir(exist_ok=True)
    job = RecordShards(corpus)
    shards = dict(enumerate(job.shards))
    sizes = {number: sum(corpus.sentences[i].n_tokens for i in shard) for number, shard in shards.items()}
    n_rows = {number: len(shard) for number, shard in shards.items()}
    own_bytes = corpus.language_model.model.get_memory_footprint()  # room for activations, about
    workers.run(job, "Language model", "tokens", sizes, n_rows, worker_bytes=own_bytes)


def add_up(corpus: ClusteredCorpus) -> PartialSums:
    """Add all shards up."""
    sums = PartialSums.zeros(np.arange(corpus.n_clusters), len(corpus.layers), corpus.layers[0].d_ff)
    job = RecordShards(corpus)
    for number in range(len(job.shards)):
        sums.add(PartialSums.load(job.result(corpus, number)))
    return sums


def _save_arrays(arrays: dict[str, Any], path: Path) -> None:
    """Write named arrays as .npz."""
    buffer = io.BytesIO()  # numpy's own message on a full disk names no cause
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getbuffer())
