"""The stages of a build, each of which leaves its result in the build folder, so that a killed build goes on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_sim.base.corpus import CorpusReport, Sentence, check_corpus, read_corpus
from coreinfer_sim.base.errors import BuildError, ClusteringError, ConfigError
from coreinfer_sim.base.files import sha256_of, write_atomic, write_json
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.processes import (
    LIBRARY_BYTES,
    default_threads,
    default_workers,
    n_cores,
    run_shards,
    torch_threads,
)
from coreinfer_sim.base.progress import Progress, counted, readable_size
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building.folder import (
    FORCED,
    PLAN,
    build_folder,
    check_output,
    clear,
    differing,
    read_sentences,
    save_npy,
    save_npz,
)
from coreinfer_sim.building.jobs import (
    Job,
    calibration_corpus,
    recorded_layers,
    runner,
    runner_of,
    shard_path,
    shards_of,
)
from coreinfer_sim.building.shards import ACTIVATION_UNIT, ENERGY_UNIT, PartialSums
from coreinfer_sim.fitting.costs import CompensationCosts
from coreinfer_sim.fitting.stages import CompensationStages, forget_sets
from coreinfer_sim.index.clustering import (
    CANDIDATES,
    N_RESTARTS,
    Clustering,
    choose_n_clusters,
    cluster_embeddings,
    distinctive_terms,
)
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.encoder import DEFAULT_ENCODER, SentenceEncoder
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    COMPENSATION_FOLDER,
    FORMAT_VERSION,
    CompensationInfo,
    CorpusInfo,
    EncoderInfo,
    Manifest,
    ModelInfo,
    SettingsInfo,
)
from coreinfer_sim.index.storage import remove_index, save_index
from coreinfer_sim.models.fingerprint import weight_sketch, weights_checksum
from coreinfer_sim.models.loading import LanguageModel, load_model, tokenizer_hash

_EMBEDDED_AT_ONCE = 128
_BYTES_PER_SUM = 3 * 8
_BYTES_PER_STATISTIC = 4 + 4 + 4
_LARGE = ("shards", "moments", "fitted", "training", COMPENSATION_FOLDER)
"""What is counted of a build folder when its need of disk is estimated."""
_N_EXEMPLARS = 3
_EXEMPLAR_LENGTH = 160
_LIBRARIES = ("coreinfer-sim", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy")


def build_index(
    model: str | LanguageModel,
    corpus: CorpusConfig | str,
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    encoder: str | SentenceEncoder = DEFAULT_ENCODER,
    dtype: str = "auto",
    device: str = "auto",
    workers: int | None = 1,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> SemanticIndex:
    """Run a corpus through a model and store each semantic cluster's core neurons.

    A killed build is continued by the same call, ``force`` included: what is finished is found in ``OUT.build``.

    Args:
        model: hub id, checkpoint folder, GGUF file, or a loaded model (then ``workers`` must be 1).
        corpus: where the prompts are.
        out: the index folder to make.
        config: what decides what is in the index.
        encoder: sentence encoder, by name or loaded.
        dtype: of the language model; see `load_model`.
        device: of the language model; "auto" a GPU where there is one.
        workers: processes that share the shards; None fills the cores. More than one needs the caller's
            ``if __name__ == "__main__"``, as always with Python's multiprocessing.
        threads: torch threads of each process; None a quarter of the cores. Part of the build, unlike ``workers``.
        force: replace an index that exists, and start anew where a build without it or of other settings was broken off; if
            only those of compensation are others, statistics are kept.
        progress: takes messages and progress.

    Raises:
        CoreInferSimError: any of its kinds; what was finished is kept.
    """
    corpus = CorpusConfig(corpus) if isinstance(corpus, str) else corpus
    config = config or BuildConfig()
    progress = progress or Progress()
    out = Path(os.path.abspath(out))
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more.")
    check_output(out, force)
    folder = out.with_name(out.name + ".build")
    check_corpus(corpus)
    out.parent.mkdir(parents=True, exist_ok=True)  # before anything slow, so that a bad path is known at once
    language_model = load_model(model, dtype, device) if isinstance(model, str) else model
    if not isinstance(model, str) and workers != 1:
        raise ConfigError("a loaded model cannot be shared among processes; give its name, or workers=1.")
    kind = str(language_model.model.device)
    sentence_encoder = SentenceEncoder(encoder, kind) if isinstance(encoder, str) else encoder
    n_threads = threads or default_threads(kind)
    job = Job(language_model.name, language_model.dtype_name, kind, folder, config, corpus.max_tokens, n_threads)
    with build_folder(folder):
        build = _Build(job, corpus, language_model, sentence_encoder, progress)
        build.check_plan(force)
        build.read()
        build.check_room(out, workers)
        with torch_threads(n_cores()):
            build.embed()
            build.cluster()
        build.check_disk(build.n_clusters, out, workers)
        with torch_threads(n_threads):
            build.run(workers)
        stages = build.compensation()
        if stages is not None:
            with torch_threads(n_cores()):
                stages.share_out()
                stages.compensate_globally()
                stages.distil_globally()
            with torch_threads(n_threads):
                stages.compensate_clusters(workers)
                stages.distil_clusters(workers)
            with torch_threads(n_cores()):
                stages.choose_sets()
        build.write(out, stages)
    shutil.rmtree(folder)
    return SemanticIndex.load(out, sentence_encoder)


def _without_compensation(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what statistics depend on of a plan."""
    return {**plan, "config": {**plan["config"], "compensation": None}}


class _Build:
    """One build: its stages share the corpus, the embeddings and the clustering."""

    def __init__(
        self,
        job: Job,
        corpus: CorpusConfig,
        language_model: LanguageModel,
        encoder: SentenceEncoder,
        progress: Progress,
    ) -> None:
        self.job, self.corpus, self.progress = job, corpus, progress
        self.language_model, self.encoder = language_model, encoder
        self.folder, self.config = job.folder, job.config
        self.layers = recorded_layers(language_model, job.config)
        self.report = CorpusReport()
        self.sentences: list[Sentence] = []
        self.embeddings = np.zeros((0, encoder.dimension), np.float32)
        self.clustering: Clustering | None = None

    def check_plan(self, force: bool) -> None:
        """Compare the settings with those of a build that was broken off here, or write them down."""
        limit = self.language_model.context_length
        if limit is not None and self.corpus.max_tokens > limit:
            raise ConfigError(
                f"max_tokens is {self.corpus.max_tokens}, but the model's context is {limit}; give a smaller --max-tokens."
            )
        plan = {
            "corpus": asdict(self.corpus),
            "corpus_file": sha256_of(source) if (source := Path(self.corpus.source)).is_file() else None,
            "config": self.config.as_dict(),
            "model": self.language_model.name,
            "dtype": self.job.dtype,
            "device": self.language_model.model.device.type,
            "n_threads": self.job.n_threads,
            "weights": weights_checksum(self.language_model.layers),
            "encoder": self.encoder.probe(),
        }
        plan = json.loads(json.dumps(plan))  # as it will be read
        path, forced = self.folder / PLAN, self.folder / FORCED
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        different = [] if found is None else differing(found, plan)
        if different and not force:
            raise BuildError(
                f"{self.folder} holds a build with other settings – {', '.join(different)} –, expected the same; repeat them "
                "to go on, or give --force to start anew – where only compensation differs, behind the statistics."
            )
        if found is not None and not different and (forced.exists() or not force):
            self.progress.say(f"Continuing the build in {self.folder}.")
            return
        if found is not None and different and _without_compensation(found) == _without_compensation(plan):
            forget_sets(self.folder)
            self.progress.say(f"Making other compensated sets from the statistics in {self.folder}.")
        else:
            clear(self.folder)
        if force:
            forced.touch()
        write_json(path, plan)

    def read(self) -> None:
        """Stage 1: draw the sentences from the corpus into ``corpus.jsonl``."""
        path, report_path = self.folder / "corpus.jsonl", self.folder / "corpus-report.json"
        if not report_path.exists():
            self._read_source(path)
            write_json(report_path, self.report.as_dict())
        self.report = CorpusReport(**json.loads(report_path.read_text(encoding="utf-8")))
        self.sentences = read_sentences(path)
        self.progress.say(f"Corpus: {self.report}.")

    def _read_source(self, path: Path) -> None:
        tokenizer = self.language_model.tokenizer
        drawn, self.report = read_corpus(self.corpus, lambda texts: tokenizer(texts, verbose=False)["input_ids"])
        self.progress.start("Reading the corpus", self.corpus.limit, "prompts")

        def write(part: Path) -> None:
            with part.open("w", encoding="utf-8") as file:
                for sentence in drawn:
                    file.write(json.dumps(asdict(sentence), ensure_ascii=False) + "\n")
                    self.progress.advance(1)

        try:
            write_atomic(path, write)
        finally:
            self.progress.finish()

    def check_room(self, out: Path, workers: int | None) -> None:
        """Print the plan and refuse a disk that is too small, unless the number of clusters is still to be chosen."""
        n_sentences, config = self.report.n_kept, self.config
        n_clusters = config.clusters
        if isinstance(n_clusters, str):
            n_clusters = min(CANDIDATES[-1], max(1, n_sentences // 8))
        if n_clusters > n_sentences:
            raise ClusteringError(
                f"{counted(n_clusters, 'cluster')} were asked for, but the corpus holds "
                f"{counted(n_sentences, 'prompt')}; give a smaller --clusters or a larger corpus."
            )
        n_values = len(self.layers) * self.layers[0].d_ff
        costs = CompensationCosts(self.layers, config.compensation)
        index_bytes, build_bytes = self._disk(n_clusters, workers)
        model_bytes = self.language_model.model.get_memory_footprint() + LIBRARY_BYTES
        worker_bytes = max(costs.fitting(), costs.training(n_clusters))
        memory = model_bytes + max(worker_bytes, costs.comparing())
        memory += n_clusters * n_values * (_BYTES_PER_SUM + _BYTES_PER_STATISTIC)
        worker_bytes += model_bytes
        at_most = "at most " if config.clusters == "auto" else ""
        self.progress.say(
            f"Plan: {counted(n_sentences, 'prompt')}, {counted(self.report.n_tokens, 'token')}, "
            f"{at_most}{counted(n_clusters, 'cluster')}, {counted(self._n_shards, 'shard')}; "
            f"disk {at_most}{readable_size(index_bytes)} for the index and {readable_size(build_bytes)} while building; "
            f"memory about {readable_size(memory)} and {readable_size(worker_bytes)} for every further worker."
        )
        if config.clusters != "auto":
            self.check_disk(n_clusters, out, workers)

    def check_disk(self, n_clusters: int, out: Path, workers: int | None) -> None:
        """Refuse a disk that is too small for what this build has not written yet.

        Raises:
            BuildError: so it is.
        """
        written = (path for name in _LARGE for path in (self.folder / name).rglob("*") if path.is_file())
        taken = sum(path.stat().st_size for path in written)
        free, needed = shutil.disk_usage(self.folder).free, sum(self._disk(n_clusters, workers)) - taken
        if free < needed:
            raise BuildError(
                f"{readable_size(free)} are free beside {out}, expected {readable_size(needed)}; free some space, or start "
                "anew with fewer --clusters."
            )

    @property
    def _n_shards(self) -> int:
        return -(-self.report.n_kept // self.config.shard_size)

    def _disk(self, n_clusters: int, workers: int | None) -> tuple[int, int]:
        """Return the bytes that the index takes, and what the build takes beside it until its end."""
        n_workers = workers or max(1, n_cores() // self.job.n_threads)
        n_values = len(self.layers) * self.layers[0].d_ff
        costs = CompensationCosts(self.layers, self.config.compensation)
        return (
            n_clusters * n_values * _BYTES_PER_STATISTIC + costs.index_disk(n_clusters),
            (self._n_shards + n_clusters) * n_values * _BYTES_PER_SUM + costs.build_disk(n_clusters, n_workers),
        )

    def embed(self) -> None:
        """Stage 2: embed the prompts, in pieces that are kept."""
        folder = self.folder / "embeddings"
        folder.mkdir(exist_ok=True)
        n = len(self.sentences)
        begins = range(0, n, _EMBEDDED_AT_ONCE)
        paths = [folder / f"{begin:09d}.npy" for begin in begins]
        done = sum(min(_EMBEDDED_AT_ONCE, n - b) for b, path in zip(begins, paths, strict=True) if path.exists())
        self.progress.start("Embedding", n, "prompts", done)
        try:
            for begin, path in zip(begins, paths, strict=True):
                if not path.exists():
                    block = [sentence.prompt for sentence in self.sentences[begin : begin + _EMBEDDED_AT_ONCE]]
                    vectors = self.encoder.encode(block)
                    write_atomic(path, partial(save_npy, vectors))
                    give_back_memory()
                    self.progress.advance(len(block))
        finally:
            self.progress.finish()
        self.embeddings = np.concatenate([np.load(path) for path in paths])

    def cluster(self) -> None:
        """Stage 3: k-means, or what it gave before."""
        path = self.folder / "clustering.npz"
        if not path.exists():
            n_clusters = self.config.clusters
            if isinstance(n_clusters, str):
                n_clusters = self._choose()
            self.progress.start("Clustering", N_RESTARTS, "starts")
            try:
                clustering = cluster_embeddings(self.embeddings, n_clusters, self.config.seed, self.progress.advance)
            finally:
                self.progress.finish()
            write_atomic(path, lambda part: save_npz(part, **vars(clustering)))
        with np.load(path) as arrays:
            self.clustering = Clustering(**arrays)

    def _choose(self) -> int:
        self.progress.start("Comparing numbers of clusters", None, "candidates")
        say = self.progress.say

        def report(k: int, silhouette: float) -> None:
            self.progress.advance(1)
            say(f"  {k:4d} clusters: silhouette {silhouette:.4f} {'▇' * max(0, round(100 * silhouette))}")

        try:
            best, _ = choose_n_clusters(self.embeddings, self.config.seed, report)
        finally:
            self.progress.finish()
        say(f"Chosen: {best} clusters.")
        return best

    @property
    def n_clusters(self) -> int:
        """Number of clusters, once they are known."""
        assert self.clustering is not None
        return len(self.clustering.centroids)

    def run(self, workers: int | None) -> None:
        """Stage 4: the language model over every shard that is not finished yet."""
        assert self.clustering is not None
        (self.folder / "shards").mkdir(exist_ok=True)
        shards = shards_of(self.sentences, self.clustering, self.config)
        open_shards = [i for i in range(len(shards)) if not shard_path(self.folder, i).exists()]
        n_open = sum(self.sentences[i].n_tokens for shard in open_shards for i in shards[shard])
        model_bytes = self.language_model.model.get_memory_footprint()
        worker_bytes = 2 * model_bytes + LIBRARY_BYTES
        n_workers = workers or default_workers(self.job.device, self.job.n_threads, worker_bytes)
        run = runner(self.job, self.language_model, self.sentences, self.clustering)
        self.progress.start("Language model", self.report.n_tokens, "tokens", self.report.n_tokens - n_open)
        try:
            run_shards(open_shards, run, n_workers, runner_of, self.job, self.progress.advance)
        finally:
            self.progress.finish()

    def compensation(self) -> CompensationStages | None:
        """Return the stages that make compensated sets, if they are wanted."""
        if self.config.compensation is None:
            return None
        assert self.clustering is not None
        corpus = calibration_corpus(self.job, self.language_model, self.sentences, self.clustering)
        return CompensationStages(self.job, corpus, lambda: self.sums, self.progress)

    def write(self, out: Path, stages: CompensationStages | None) -> None:
        """Last stage: add the shards up and put the index in place in one step."""
        assert self.clustering is not None
        sums = self.sums
        part = out.with_name(f".{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            statistics = {
                "counts": sums.counts.astype(np.min_scalar_type(int(sums.counts.max(initial=0)))),
                "energy": (sums.energy * ENERGY_UNIT).astype(np.float32),
                "activation": (sums.activation * ACTIVATION_UNIT).astype(np.float32),
            }
            if stages is not None:
                stages.put_sets(part)
            manifest = self._manifest([] if stages is None else stages.described())
            save_index(part, self.clustering.centroids, self._clusters(), statistics, manifest)
            SemanticIndex.load(part, self.encoder)  # what cannot be read replaces nothing
            if out.exists():
                remove_index(out)
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @cached_property
    def sums(self) -> PartialSums:
        """All shards added up."""
        assert self.clustering is not None
        sums = PartialSums.zeros(np.arange(self.n_clusters), len(self.layers), self.layers[0].d_ff)
        for number in range(len(shards_of(self.sentences, self.clustering, self.config))):
            sums.add(PartialSums.load(shard_path(self.folder, number)))
        return sums

    def _clusters(self) -> list[Cluster]:
        assert self.clustering is not None
        clustering, sentences = self.clustering, self.sentences
        n_clusters = len(clustering.centroids)
        labels = distinctive_terms([s.prompt for s in sentences], clustering.assignment, n_clusters)
        clusters = []
        for number, label in enumerate(labels):
            members = np.flatnonzero(clustering.assignment == number)
            nearest = clustering.exemplars(number, _N_EXEMPLARS)
            clusters.append(
                Cluster(
                    id=number,
                    size=len(members),
                    n_tokens=sum(sentences[i].n_tokens for i in members),
                    label=label,
                    exemplars=[" ".join(sentences[i].prompt.split())[:_EXEMPLAR_LENGTH] for i in nearest],
                    exemplar_ids=[sentences[i].id for i in nearest],
                    similarity_quantiles=clustering.quantiles(number),
                )
            )
        return clusters

    def _manifest(self, compensation: list[CompensationInfo]) -> Manifest:
        assert self.clustering is not None
        language_model, encoder, config, layers = self.language_model, self.encoder, self.config, self.layers
        n_clusters = len(self.clustering.centroids)
        return Manifest(
            format_version=FORMAT_VERSION,
            versions={name: version(name) for name in _LIBRARIES},
            model=ModelInfo(
                name=language_model.name,
                revision=getattr(language_model.model.config, "_commit_hash", None),
                family=layers[0].family.name,
                dtype=language_model.dtype_name,
                n_layers=len(language_model.layers),
                d_model=layers[0].d_model,
                d_ff=layers[0].d_ff,
                weight_sketch=weight_sketch(language_model.layers),
                tokenizer_sha256=tokenizer_hash(language_model.tokenizer),
                activation_site=f"input of {layers[0].family.output}",
            ),
            encoder=EncoderInfo(encoder.name, encoder.dimension, True, "cosine", encoder.probe()),
            corpus=CorpusInfo(
                Path(self.corpus.source).name, self.report.sha256, self.report.n_kept, self.report.n_tokens
            ),
            settings=SettingsInfo(
                n_clusters=n_clusters,
                alpha=config.alpha,
                beta=config.beta,
                gamma=config.gamma,
                seed=config.seed,
                layers=[layer.number for layer in layers],
                batch_size=config.batch_size,
                shard_size=config.shard_size,
                n_threads=self.job.n_threads,
            ),
            compensation=compensation,
            profile=None,
            files={},
        )
