"""More clusters out of those of an index: the widest are split, and their texts alone pass through the model again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from coreinfer_sim.base.errors import ClusteringError, CorpusError
from coreinfer_sim.base.files import remove
from coreinfer_sim.base.progress import Progress, counted, shown
from coreinfer_sim.base.rows import Row, read_corpus
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.building.extending import part_of
from coreinfer_sim.building.folder import holding
from coreinfer_sim.building.merging import Members, members_of, note_left_out, profiles_by_token, write_changed
from coreinfer_sim.building.stages import embed
from coreinfer_sim.index.clustering import assign, cluster_embeddings, quantiles_of
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import CorpusInfo, SumsInfo
from coreinfer_sim.index.prompt_map import PromptMap, lay_out
from coreinfer_sim.index.sums import Sums
from coreinfer_sim.models.loading import load_tokenizer
from coreinfer_sim.models.prompts import rendered


def split(
    index: SemanticIndex,
    n_clusters: int,
    corpus: CorpusConfig | str,
    out: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    workers: int | None = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> SemanticIndex:
    """Split clusters of an index until there are so many, the largest first; the others keep their texts and sums.

    The cluster is split next whose pieces' texts are the least like their centroid, all together.

    Args:
        index: with exact sums of one corpus.
        n_clusters: more than it has.
        corpus: that one, read as it was.
        out: the index folder to make.
        model: where the index's model lies now; None: where the index says.
        device: of the language model.
        workers: processes, as for `build_index`.
        force: replace an index that exists, which may be this one.
        progress: takes messages and progress; None: see `shown`.

    Raises:
        CorpusError: it is another corpus, or read in another way.
        ClusteringError: the texts cannot be cut into so many clusters.
        CoreInferSimError: any other of its kinds; the same call goes on with what was finished.
    """
    place = Path(out).resolve()
    corpus = CorpusConfig(corpus) if isinstance(corpus, str) else corpus
    with holding(place, force):
        return _split_to(index, n_clusters, corpus, place, model, device, workers, shown(progress))


def _split_to(
    index: SemanticIndex,
    n_clusters: int,
    corpus: CorpusConfig,
    place: Path,
    model: str | None,
    device: str,
    workers: int | None,
    progress: Progress,
) -> SemanticIndex:
    """Make the index of split clusters at a place that this process holds."""
    sums = index.sums()
    members = members_of(index, sums)
    name, work = model or index.model_place, place.with_name(f".{place.name}.split")
    # 1) the texts, and the clusters that they are in
    rows = _rows_of(index, corpus, name)
    n_pieces = _n_pieces(members, n_clusters)
    work.mkdir(parents=True, exist_ok=True)
    embeddings = embed(work, rows, index.encoder, progress)
    now = assign(index.centroids, embeddings)
    numbers = now.members()
    _check_same(index, [len(each) for each in numbers])
    # 2) the pieces
    kept, cut = np.flatnonzero(n_pieces == 1), np.flatnonzero(n_pieces > 1)
    centroids = np.concatenate(
        [
            cluster_embeddings(
                embeddings[np.sort(numbers[each])], int(n_pieces[each]), index.manifest.settings.seed
            ).centroids
            for each in cut.tolist()
        ]
    )
    texts = np.flatnonzero(np.isin(now.assignment, cut))
    progress.say(
        f"{counted(len(cut), 'cluster')} split into {len(centroids)}; {counted(len(texts), 'prompt')} of {len(rows):,} are read "
        "again."
    )
    # 3) their texts pass through the model
    (work / "texts.jsonl").write_text("".join(_line(rows[number]) for number in texts.tolist()), encoding="utf-8")
    of_texts = CorpusConfig(
        str(work / "texts.jsonl"),
        prompt_column="prompt",
        template="{text}",
        max_tokens=corpus.max_tokens,
        deduplicate=False,
    )
    topics = _without_texts(index, centroids, work / "topics")
    part = part_of(index, of_texts, work / "part", name, device, workers, progress, topics)
    # 4) all together, the largest first
    new = part.sums()
    parts = [*(members[number] for number in kept.tolist()), *members_of(part, new)]
    order = np.argsort([-each.cluster.size for each in parts], kind="stable")
    assignment = np.searchsorted(kept, now.assignment)
    assignment[texts] = len(kept) + assign(part.centroids, embeddings[texts]).assignment
    counts, energy, activation = (
        np.concatenate([before[kept], after])[order]
        for before, after in ((sums.counts, new.counts), (sums.energy, new.energy), (sums.activation, new.activation))
    )
    whole = Sums(counts, energy, activation, np.concatenate([parts[old].similarity for old in order.tolist()]))
    prompts = [row.prompt for row in rows]
    made = _write(
        index,
        place,
        np.concatenate([index.centroids[kept], centroids])[order],
        [replace(parts[old].cluster, id=number) for number, old in enumerate(order.tolist())],
        whole,
        None if index.manifest.map is None else _map(index, embeddings, np.argsort(order)[assignment], prompts),
        progress,
    )
    remove(work)
    return made


def _write(
    index: SemanticIndex,
    place: Path,
    centroids: np.ndarray,
    clusters: Sequence[Cluster],
    sums: Sums,
    prompt_map: PromptMap | None,
    progress: Progress,
) -> SemanticIndex:
    """Write the new index; what is of the whole corpus stays."""
    profiles = profiles_by_token(index.manifest)
    note_left_out([index.manifest], profiles, True, progress)
    settings = replace(index.manifest.settings, n_clusters=len(clusters))
    manifest = replace(index.manifest, settings=settings, compensation=[], profiles=profiles)
    return write_changed(index, place, manifest, centroids, clusters, sums, index.histograms, prompt_map, index)


def _map(index: SemanticIndex, embeddings: np.ndarray, assignment: np.ndarray, prompts: Sequence[str]) -> PromptMap:
    info = index.manifest.map
    return lay_out(embeddings, assignment, prompts, index.manifest.settings.seed, info is not None and info.texts)


def _check_same(index: SemanticIndex, found: Sequence[int]) -> None:
    """Raise ClusteringError unless clusters have as many texts as the index says."""
    if found != (sizes := [cluster.size for cluster in index.clusters]):
        raise ClusteringError(
            f"{index.name} has clusters of {sizes} prompts, and its encoder now finds {found}, expected the same; use the "
            "releases of torch and sentence-transformers that it was built with."
        )


def _rows_of(index: SemanticIndex, corpus: CorpusConfig, model: str) -> list[Row]:
    """Read the corpus of an index.

    Raises:
        ClusteringError: the index is of several.
        CorpusError: it is another one.
    """
    assert index.manifest.sums is not None
    corpora = index.manifest.sums.corpora
    if len(corpora) > 1:
        raise ClusteringError(
            f"{index.name} holds {len(corpora)} corpora, expected one, whose texts are read again; build an index over all of "
            "them with so many clusters."
        )
    tokenizer = load_tokenizer(model)
    drawn, report = read_corpus(
        corpus,
        lambda texts: tokenizer(texts, verbose=False)["input_ids"],
        partial(rendered, tokenizer, "the model"),
    )
    rows = list(drawn)
    if report.sha256 != corpora[0].sha256:
        raise CorpusError(
            f"{corpus.source} holds {counted(len(rows), 'prompt')} of the checksum {report.sha256[:12]}…, expected the "
            f"{corpora[0].n_sentences:,} of {corpora[0].source} ({corpora[0].sha256[:12]}…) that {index.name} was built over; "
            "name that corpus, with the same column, template and limits."
        )
    return rows


def _n_pieces(members: Sequence[Members], n_clusters: int) -> np.ndarray:
    """Return how many pieces each cluster is cut into, [n_clusters before]."""
    sizes = np.array([len(each.similarity) for each in members])
    losses = np.array([float((1 - each.similarity).sum(dtype=np.float64)) for each in members])
    pieces = np.ones(len(members), np.int64)
    for _ in range(n_clusters - len(members)):
        left = np.where(pieces < sizes, losses / pieces, -np.inf)
        number = int(left.argmax())
        if not left[number] > 0:
            raise ClusteringError(
                f"{counted(n_clusters, 'cluster')} were asked for, but the texts are cut into {int(pieces.sum())} at most; give "
                "a smaller number."
            )
        pieces[number] += 1
    return pieces


def _line(row: Row) -> str:
    return json.dumps({"id": row.id, "prompt": row.prompt, "text": row.text}, ensure_ascii=False) + "\n"


def _without_texts(index: SemanticIndex, centroids: np.ndarray, place: Path) -> SemanticIndex:
    """Write an index of the same model with other clusters, and no texts in them yet."""
    settings, model = index.manifest.settings, index.manifest.model
    shape = (len(centroids), len(settings.layers), model.d_ff)
    nothing = np.zeros(0, np.float32)
    corpus = CorpusInfo("none", "", 0, 0)
    manifest = replace(
        index.manifest,
        settings=replace(settings, n_clusters=len(centroids)),
        corpus=corpus,
        sums=SumsInfo([corpus]),
        compensation=[],
        profiles={},
        refit=None,
    )
    clusters = [Cluster(number, 0, 0, "", [], [], quantiles_of(nothing)) for number in range(len(centroids))]
    zeros = np.zeros(shape, np.int64)
    sums = Sums(zeros, zeros, zeros, nothing)
    return write_changed(index, place, manifest, centroids, clusters, sums, {}, None, None)
