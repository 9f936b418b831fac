"""The stages of a build, each of which leaves its result in the build folder, so that a killed build goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from coreinfer_sim.architectures import MLPLayer, weight_sketch, weights_checksum
from coreinfer_sim.build.comparing import Kind, choose_kinds, compare_sets, plain_set
from coreinfer_sim.build.compensating import (
    Training,
    fitted_path,
    held_out,
    neurons_by_ratio,
    set_tokens,
    sets_to_fit,
    trainings,
)
from coreinfer_sim.build.executors import (
    default_threads,
    default_workers,
    n_cores,
    run_shards,
    torch_threads,
)
from coreinfer_sim.build.folder import build_folder, check_output, differing, link, read_sentences, save_npy, save_npz
from coreinfer_sim.build.jobs import (
    Job,
    distiller,
    distiller_of,
    fitter,
    fitter_of,
    recorded_layers,
    runner,
    runner_of,
    shard_path,
    shards_of,
)
from coreinfer_sim.build.sensitivity import check_ranks
from coreinfer_sim.build.shards import ACTIVATION_UNIT, ENERGY_UNIT, PartialSums
from coreinfer_sim.build.students import checkpoint_bytes, training_bytes
from coreinfer_sim.clustering import N_RESTARTS, Clustering, choose_n_clusters, cluster_embeddings, distinctive_terms
from coreinfer_sim.compensated import save_compensated
from coreinfer_sim.compensation import size_of_change
from coreinfer_sim.config import BuildConfig, CorpusConfig
from coreinfer_sim.corpus import CorpusReport, Sentence, check_corpus, read_corpus
from coreinfer_sim.embeddings import DEFAULT_ENCODER, SentenceEncoder
from coreinfer_sim.errors import BuildError, ClusteringError, ConfigError
from coreinfer_sim.files import sha256_of, write_atomic, write_json
from coreinfer_sim.index import Cluster, SemanticIndex, remove_index, save_parts
from coreinfer_sim.manifest import (
    COMPENSATION_FOLDER,
    FORMAT_VERSION,
    CompensationInfo,
    CorpusInfo,
    EncoderInfo,
    Manifest,
    ModelInfo,
    SettingsInfo,
    compensation_file,
)
from coreinfer_sim.memory import give_back_memory
from coreinfer_sim.models import LanguageModel, load_model, tokenizer_hash
from coreinfer_sim.progress import Progress, counted, readable_size
from coreinfer_sim.selection import NeuronSelection

_EMBEDDED_AT_ONCE = 128
_LIBRARY_BYTES = 900 << 20
"""What Python, torch, the encoder and a batch take, roughly."""
_BYTES_PER_SUM = 3 * 8
_BYTES_PER_STATISTIC = 4 + 4 + 4
_MOST_AUTO_CLUSTERS = 256
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

    A killed build is continued by the same call: stages and shards that are finished are found in ``OUT.build``.

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
        force: replace an index that exists, and start anew where a build was broken off.
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
    kind = language_model.model.device.type
    sentence_encoder = SentenceEncoder(encoder, kind) if isinstance(encoder, str) else encoder
    n_threads = threads or default_threads(kind)
    job = Job(language_model.name, language_model.dtype_name, kind, folder, config, corpus.max_tokens, n_threads)
    with build_folder(folder, force):
        build = _Build(job, corpus, language_model, sentence_encoder, progress)
        build.check_plan()
        build.read()
        build.check_room(out, workers)
        with torch_threads(n_cores()):
            build.embed()
            build.cluster()
        with torch_threads(n_threads):
            build.run(workers)
        if config.compensation is not None:
            with torch_threads(n_cores()):
                build.share_out()
                build.compensate_globally()
                build.distil_globally()
            with torch_threads(n_threads):
                build.compensate_clusters(workers)
                build.distil_clusters(workers)
            with torch_threads(n_cores()):
                build.choose_sets()
        build.write(out)
    shutil.rmtree(folder)
    return SemanticIndex.load(out, sentence_encoder)


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
        if (settings := job.config.compensation) is not None:
            check_ranks(self.layers[0], settings.keep_ratios, settings.rank, settings.bypass_rank)
        self.report = CorpusReport()
        self.sentences: list[Sentence] = []
        self.embeddings = np.zeros((0, encoder.dimension), np.float32)
        self.clustering: Clustering | None = None

    def check_plan(self) -> None:
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
            "device": self.job.device,
            "n_threads": self.job.n_threads,
            "weights": weights_checksum(self.language_model.layers),
            "encoder": self.encoder.probe(),
        }
        plan = json.loads(json.dumps(plan))  # as it will be read
        path = self.folder / "plan.json"
        if not path.exists():
            write_json(path, plan)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        different = differing(found, plan)
        if different:
            raise BuildError(
                f"{self.folder} holds a build with another {', '.join(different)}, expected the same settings; repeat them "
                "to go on, or give --force to start anew."
            )
        self.progress.say(f"Continuing the build in {self.folder}.")

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
        """Print the plan and refuse a disk that is too small."""
        n_workers = workers or max(1, n_cores() // self.job.n_threads)
        n_sentences, config = self.report.n_kept, self.config
        n_clusters = config.clusters
        if isinstance(n_clusters, str):
            n_clusters = min(_MOST_AUTO_CLUSTERS, max(2, n_sentences // 8))
        if n_clusters > n_sentences:
            raise ClusteringError(
                f"{counted(n_clusters, 'cluster')} were asked for, but the corpus holds "
                f"{counted(n_sentences, 'prompt')}; give a smaller --clusters or a larger corpus."
            )
        n_values = len(self.layers) * self.layers[0].d_ff
        n_shards = -(-n_sentences // config.shard_size)
        fitted_bytes = self._fitted_bytes() * (n_clusters + 1 if n_clusters > 1 else 1)
        index_bytes = n_clusters * n_values * _BYTES_PER_STATISTIC + fitted_bytes
        build_bytes = (n_shards + n_clusters) * n_values * _BYTES_PER_SUM
        if (settings := config.compensation) is not None:
            if settings.own_fits and n_clusters > 1:
                build_bytes += self._moment_bytes() * len(self.layers) * len(settings.keep_ratios)
            if settings.distil_tokens:  # the sets as they were fitted stay until the end
                build_bytes += fitted_bytes if settings.own_fits else self._fitted_bytes()
                build_bytes += n_workers * self._of_training(checkpoint_bytes, n_clusters)
        model_bytes = self.language_model.model.get_memory_footprint()
        worker_bytes = model_bytes + max(self._fitting_bytes(), self._training_bytes(n_clusters)) + _LIBRARY_BYTES
        memory = worker_bytes + n_clusters * n_values * (_BYTES_PER_SUM + _BYTES_PER_STATISTIC)
        at_most = "at most " if config.clusters == "auto" else ""
        self.progress.say(
            f"Plan: {counted(n_sentences, 'prompt')}, {counted(self.report.n_tokens, 'token')}, "
            f"{at_most}{counted(n_clusters, 'cluster')}, {counted(n_shards, 'shard')}; "
            f"disk {at_most}{readable_size(index_bytes)} for the index and {readable_size(build_bytes)} while building; "
            f"memory about {readable_size(memory)} and {readable_size(worker_bytes)} for every further worker."
        )
        free = shutil.disk_usage(self.folder).free
        if free < index_bytes + build_bytes and config.clusters != "auto":
            raise BuildError(
                f"{readable_size(free)} are free beside {out}, expected {readable_size(index_bytes + build_bytes)}; free "
                "some space or give fewer --clusters."
            )

    def _fitted_bytes(self) -> int:
        """Return the disk that one cluster's compensated sets need, of all keep ratios."""
        settings = self.config.compensation
        if settings is None:
            return 0
        d_ff, d_model = self.layers[0].d_ff, self.layers[0].d_model
        fitted = 0
        for ratio in settings.keep_ratios:
            n_kept = int(ratio * d_ff)
            change = size_of_change(n_kept, d_model, settings.rank)
            fitted += 4 * n_kept + 2 * (change + d_model + 2 * settings.bypass_rank * d_model)
        return fitted * len(self.layers)

    def _moment_bytes(self) -> int:
        """Return the bytes of one layer's moments of all neurons."""
        assert self.config.compensation is not None
        n_features = self.layers[0].d_ff + (self.layers[0].d_model if self.config.compensation.bypass_rank else 0)
        return 4 * n_features * (n_features + self.layers[0].d_model)

    def _fitting_bytes(self) -> int:
        """Return the memory that fitting a set takes beside the model, texts aside: moments, and copies to factor them."""
        return 0 if self.config.compensation is None else 4 * self._moment_bytes()

    def _training_bytes(self, n_clusters: int) -> int:
        """Return the memory that one training takes beside the model, texts aside."""
        return self._of_training(training_bytes, n_clusters)

    def _of_training(self, n_bytes: Callable[[list[MLPLayer], float, int | None, int], int], n_clusters: int) -> int:
        """Add up over the keep ratios what a training of the build takes of something."""
        settings = self.config.compensation
        if settings is None or not settings.distil_tokens:
            return 0
        n_sharing = max(len(training.clusters) for training in trainings(settings, n_clusters))
        return sum(n_bytes(self.layers, ratio, settings.rank, n_sharing) for ratio in settings.keep_ratios)

    def embed(self) -> None:
        """Stage 2: embed the prompts, in pieces that are kept."""
        folder = self.folder / "embeddings"
        folder.mkdir(exist_ok=True)
        n = len(self.sentences)
        begins = range(0, n, _EMBEDDED_AT_ONCE)
        paths = [folder / f"{begin:09d}.npy" for begin in begins]
        done = sum(min(_EMBEDDED_AT_ONCE, n - b) for b, path in zip(begins, paths, strict=True) if path.exists())
        self.progress.start("Embedding", n, "prompts", done)
        for begin, path in zip(begins, paths, strict=True):
            if not path.exists():
                block = [sentence.prompt for sentence in self.sentences[begin : begin + _EMBEDDED_AT_ONCE]]
                vectors = self.encoder.encode(block)
                write_atomic(path, partial(save_npy, vectors))
                give_back_memory()
                self.progress.advance(len(block))
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

    def run(self, workers: int | None) -> None:
        """Stage 4: the language model over every shard that is not finished yet."""
        assert self.clustering is not None
        (self.folder / "shards").mkdir(exist_ok=True)
        shards = shards_of(self.sentences, self.clustering, self.config)
        open_shards = [i for i in range(len(shards)) if not shard_path(self.folder, i).exists()]
        n_open = sum(self.sentences[i].n_tokens for shard in open_shards for i in shards[shard])
        model_bytes = self.language_model.model.get_memory_footprint()
        worker_bytes = 2 * model_bytes + _LIBRARY_BYTES
        n_workers = workers or default_workers(self.job.device, self.job.n_threads, worker_bytes)
        run = runner(self.job, self.language_model, self.sentences, self.clustering)
        self.progress.start("Language model", self.report.n_tokens, "tokens", self.report.n_tokens - n_open)
        try:
            run_shards(open_shards, run, n_workers, runner_of, self.job, self.progress.advance)
        finally:
            self.progress.finish()

    def share_out(self) -> None:
        """Stage 5: measure the layers' sensitivity, and share the neurons of compensated sets out among them."""
        assert self.clustering is not None
        path = self.folder / "neurons.json"
        if not path.exists():
            n_layers = len(self.language_model.layers)
            self.progress.start("Measuring layers", n_layers, "layers")
            try:
                numbers = [layer.number for layer in self.layers]
                kept = neurons_by_ratio(
                    self.language_model,
                    numbers,
                    self.sentences,
                    self.clustering,
                    self.config,
                    self.job.max_tokens,
                    self.progress.advance,
                )
            finally:
                self.progress.finish()
            write_json(path, kept)

    def compensate_globally(self) -> None:
        """Stage 6: fit the sets of the whole corpus, towards which the clusters' are shrunk."""
        self._fit(lambda cluster: cluster is None, "Compensating, whole corpus", 1)

    def distil_globally(self) -> None:
        """Stage 7: train the whole corpus's sets on, if no other set could be trained beside them."""
        assert self.config.compensation is not None and self.clustering is not None
        if not self.config.compensation.own_fits or len(self.clustering.centroids) == 1:
            self._distil(lambda training: training.clusters == (None,), "Distilling, whole corpus", 1)

    def compensate_clusters(self, workers: int | None) -> None:
        """Stage 8: fit each cluster's set, unless the trained set of the whole corpus will be specialised."""
        assert self.config.compensation is not None
        if self.config.compensation.own_fits:
            n_workers = workers or self._workers_within(self._fitting_bytes())
            self._fit(lambda cluster: cluster is not None, "Compensating clusters", n_workers)

    def distil_clusters(self, workers: int | None) -> None:
        """Stage 9: train each cluster's set on; the whole corpus's beside them, unless that has been done."""
        assert self.clustering is not None
        n_workers = workers or self._workers_within(self._training_bytes(len(self.clustering.centroids)))
        self._distil(lambda _training: True, "Distilling", n_workers)

    def choose_sets(self) -> None:
        """Stage 10: find the clusters that the whole corpus's set serves better, and whether plain neurons serve all better."""
        assert self.clustering is not None and self.config.compensation is not None
        path = self.folder / "compared.json"
        n_clusters = len(self.clustering.centroids)
        if not path.exists():
            n_ratios = len(self.config.compensation.keep_ratios)
            n_held = int(held_out(self.clustering, self.config.seed).sum())
            self.progress.start("Comparing sets", n_held * n_ratios, "texts")
            try:
                found = compare_sets(
                    self.language_model,
                    self.sentences,
                    self.clustering,
                    self.config,
                    self.job.max_tokens,
                    self.folder,
                    self._plain_sets(),
                    self.progress.advance,
                )
            finally:
                self.progress.finish()
            write_json(path, found)
        for ratio, kinds in self._kinds().items():
            served = ", ".join(str(c) for c, kind in kinds.items() if kind is Kind.CORPUS)
            if kinds[None] is Kind.PLAIN:
                self.progress.say(
                    f"Keep ratio {ratio:g}: on held-out texts compensation does more harm than good, so plain neurons decode; "
                    "give more texts, or more --compensate-tokens or --distil-tokens."
                )
            elif served and n_clusters > 1:
                self.progress.say(f"Keep ratio {ratio:g}: the whole corpus's set serves better in clusters {served}.")

    def _plain_sets(self) -> Callable[[float, int | None], NeuronSelection]:
        """Return the function that makes plain sets of the widths of compensated ones."""
        sums = self._sums()
        numbers, d_model = [layer.number for layer in self.layers], self.layers[0].d_model
        n_kept = json.loads((self.folder / "neurons.json").read_text(encoding="utf-8"))
        return lambda ratio, cluster: plain_set(sums, numbers, n_kept[f"{ratio:g}"], cluster, d_model)

    def _kinds(self) -> dict[float, dict[int | None, Kind]]:
        """Return by keep ratio what decodes for each cluster and, under None, for the whole corpus."""
        assert self.clustering is not None and self.config.compensation is not None
        found = json.loads((self.folder / "compared.json").read_text(encoding="utf-8"))
        n_clusters = len(self.clustering.centroids)
        return {ratio: choose_kinds(found[f"{ratio:g}"], n_clusters) for ratio in self.config.compensation.keep_ratios}

    def _distil(self, wanted: Callable[[Training], bool], title: str, n_workers: int) -> None:
        assert self.clustering is not None and self.config.compensation is not None
        settings = self.config.compensation
        if not settings.distil_tokens:
            return
        every = trainings(settings, len(self.clustering.centroids))
        n_tokens = {i: self._tokens_of(training.clusters) for i, training in enumerate(every) if wanted(training)}
        unfinished = [
            i
            for i in n_tokens
            if not all(
                (self.folder / compensation_file(ratio, cluster)).exists()
                for ratio in settings.keep_ratios
                for cluster in every[i].clusters
            )
        ]
        if not unfinished:
            return
        done = sum(n_tokens.values()) - sum(n_tokens[i] for i in unfinished)
        alone = min(n_workers, len(unfinished)) == 1
        run = distiller(self.job, self.language_model, self.sentences, self.clustering, self.progress.advance, alone)
        self.progress.start(title, sum(n_tokens.values()), "tokens", done)
        try:
            run_shards(unfinished, run, n_workers, distiller_of, self.job, self.progress.advance)
        finally:
            self.progress.finish()

    def _workers_within(self, own_bytes: int) -> int:
        """Return how many processes fit that take ``own_bytes`` each beside the model and the libraries."""
        worker_bytes = self.language_model.model.get_memory_footprint() + _LIBRARY_BYTES + own_bytes
        return default_workers(self.job.device, self.job.n_threads, worker_bytes, own_bytes)

    def _fit(self, wanted: Callable[[int | None], bool], title: str, n_workers: int) -> None:
        assert self.clustering is not None and self.config.compensation is not None
        settings = self.config.compensation
        sets = sets_to_fit(settings, len(self.clustering.centroids))
        numbers = [number for number, (_ratio, cluster) in enumerate(sets) if wanted(cluster)]
        if not numbers:
            return
        unfinished = [i for i in numbers if not fitted_path(self.folder, settings, *sets[i]).exists()]
        run = fitter(self.job, self.language_model, self.sentences, self.clustering, self.progress.advance)
        n_layers = len(self.language_model.layers)
        self.progress.start(title, len(numbers) * n_layers, "layers", (len(numbers) - len(unfinished)) * n_layers)
        try:
            run_shards(unfinished, run, n_workers, fitter_of, self.job, self.progress.advance)
        finally:
            self.progress.finish()

    def _tokens_of(self, clusters: Sequence[int | None]) -> int:
        """Return how many tokens the sets of some clusters will be trained on in one go, about."""
        assert self.clustering is not None and self.config.compensation is not None
        members = ~held_out(self.clustering, self.config.seed)
        cluster = clusters[0] if len(clusters) == 1 else None
        if cluster is not None:
            members &= self.clustering.assignment == cluster
        there = np.array([min(s.n_tokens, self.job.max_tokens) for s in self.sentences])[members].sum()
        return min(int(there), set_tokens(self.config.compensation.distil_tokens, cluster))

    def write(self, out: Path) -> None:
        """Last stage: add the shards up and put the index in place in one step."""
        assert self.clustering is not None
        sums = self._sums()
        part = out.with_name(f".{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            statistics = {
                "counts": sums.counts.astype(np.min_scalar_type(int(sums.counts.max(initial=0)))),
                "energy": (sums.energy * ENERGY_UNIT).astype(np.float32),
                "activation": (sums.activation * ACTIVATION_UNIT).astype(np.float32),
            }
            if self.config.compensation is not None:
                shutil.copytree(self.folder / COMPENSATION_FOLDER, part / COMPENSATION_FOLDER, copy_function=link)
                self._put_chosen_sets(part)
            save_parts(part, self.clustering.centroids, self._clusters(), statistics, self._manifest())
            if out.exists():
                remove_index(out)
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _sums(self) -> PartialSums:
        """Add the shards up."""
        assert self.clustering is not None
        n_clusters = len(self.clustering.centroids)
        sums = PartialSums.zeros(np.arange(n_clusters), len(self.layers), self.layers[0].d_ff)
        for number in range(len(shards_of(self.sentences, self.clustering, self.config))):
            sums.add(PartialSums.load(shard_path(self.folder, number)))
        return sums

    def _put_chosen_sets(self, part: Path) -> None:
        """Put in place of a cluster's own compensated set what serves its texts better."""
        plain = self._plain_sets()
        for ratio, kinds in self._kinds().items():
            everywhere = part / compensation_file(ratio, None)
            for cluster, kind in kinds.items():  # the whole corpus first
                path = part / compensation_file(ratio, cluster)
                if kind is Kind.CORPUS:
                    path.unlink(missing_ok=True)
                    link(str(everywhere), str(path))
                elif kind is Kind.PLAIN:
                    save_compensated(path, plain(ratio, cluster))

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

    def _manifest(self) -> Manifest:
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
            compensation=self._compensation(),
            profile=None,
            files={},
        )

    def _compensation(self) -> list[CompensationInfo]:
        settings = self.config.compensation
        if settings is None:
            return []
        kept, kinds = json.loads((self.folder / "neurons.json").read_text(encoding="utf-8")), self._kinds()
        return [
            CompensationInfo(
                keep_ratio=ratio,
                rank=settings.rank,
                bypass_rank=settings.bypass_rank,
                ranking=settings.ranking.value,
                budget=settings.budget.value,
                tokens=settings.tokens,
                distil_tokens=settings.distil_tokens,
                distil_from=settings.distil_from.value if settings.distil_tokens else None,
                n_kept=kept[f"{ratio:g}"],
                plain=kinds[ratio][None] is Kind.PLAIN,
            )
            for ratio in settings.keep_ratios
        ]
