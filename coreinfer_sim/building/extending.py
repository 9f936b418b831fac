"""A corpus added to an index: its own sums over the index's clusters, added to those that are there."""

from __future__ import annotations

from pathlib import Path

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.files import remove
from coreinfer_sim.base.progress import Progress, shown
from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
from coreinfer_sim.building.build import build_index
from coreinfer_sim.building.folder import holding
from coreinfer_sim.building.merging import add_up
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.names import is_ready_made


def extend(
    index: SemanticIndex,
    corpus: CorpusConfig | str,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    device: str = "auto",
    workers: int | None = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> SemanticIndex:
    """Add a corpus to an index: only its own texts pass through the language model.

    The settings are those of the index, so that the sums are those of one build over all texts with the same centroids. A
    text that the index holds already counts once more. What `merge` says of labels, map and promises goes for the result.

    Args:
        index: with exact sums.
        corpus: whose texts are added.
        out: the index folder to make; None: the index itself, which stays whole until the new one is.
        model: where the index's model lies now; None: where the index says.
        device: of the language model.
        workers: processes, as for `build_index`.
        force: replace an index at ``out``.
        progress: takes messages and progress; None: see `shown`.

    Raises:
        CoreInferSimError: any of its kinds; the same call goes on with what was finished.
    """
    progress = shown(progress)
    # 1) what can be refused before anything is loaded
    if out is None and is_ready_made(index.folder):
        raise ConfigError(f"{index.name} comes with the package and stays as it is; say where the new index shall go.")
    place = index.folder if out is None else Path(out).resolve()
    corpus = CorpusConfig(corpus) if isinstance(corpus, str) else corpus
    with holding(place, force or out is None):
        index.sums()
        # 2) an index over the corpus alone, by the same settings and clusters
        added = place.with_name(f".{place.name}.added")
        part = part_of(index, corpus, added, model, device, workers, progress)
        # 3) both together
        part.name = Path(corpus.source).name
        found = add_up([index, part], place, progress)
        remove(added)
    return found


def part_of(
    index: SemanticIndex,
    corpus: CorpusConfig,
    place: Path,
    model: str | None,
    device: str,
    workers: int | None,
    progress: Progress,
    clusters: SemanticIndex | None = None,
) -> SemanticIndex:
    """Build an index over a corpus that can be added to another one, by its model and settings.

    Args:
        index: that other one.
        corpus: the texts.
        place: the index folder to make.
        model: where the model lies now; None: where the index says.
        device: of the language model.
        workers: processes, as for `build_index`.
        progress: takes messages and progress.
        clusters: index whose clusters are taken; None: those of the index.
    """
    settings, prompt_map = index.manifest.settings, index.manifest.map
    config = BuildConfig(
        centroids=str((clusters or index).folder),
        alpha=settings.alpha,
        beta=settings.beta,
        gamma=settings.gamma,
        seed=settings.seed,
        layers=index.recorded,
        batch_size=settings.batch_size,
        shard_size=settings.shard_size,
        texts=prompt_map is None or prompt_map.texts,
    )
    return build_index(
        model or index.model_place,
        corpus,
        place,
        config,
        encoder=index.encoder,
        dtype=index.manifest.model.dtype,
        device=device,
        workers=workers,
        threads=settings.n_threads,
        force=True,
        part_of=index,
        progress=progress,
    )
