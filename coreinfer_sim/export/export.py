"""Exports sets of an index: checks, the models one by one, and the router."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from coreinfer_sim.base.errors import ExportError
from coreinfer_sim.base.files import is_vacant, replacing, restore
from coreinfer_sim.base.progress import Progress, counted, readable_size, shown
from coreinfer_sim.base.settings import check_ratio
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.choosing.index_sets import wanted_sets
from coreinfer_sim.engines.llamacpp.router import write_router
from coreinfer_sim.export import checkpoint, gguf
from coreinfer_sim.export.weights import (
    CompactWeights,
    Source,
    compact_weights,
    exported_selection,
    needed_bytes,
)
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.chat_templates import template_of
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import check_dense

FORMATS = ("hf", "gguf")


def export(
    language_model: LanguageModel,
    index: SemanticIndex,
    sets: Sequence[int | str],
    out: str | Path,
    *,
    keep_ratio: float | None = None,
    kind: str = "hf",
    weights: str = "bf16",
    compensated: bool = True,
    router: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write sets of an index as ordinary models.

    Models that are finished stay if a later one fails, and the same call again passes over them; a broken one is never left
    under its name.

    Args:
        language_model: the dense model, checked to be the index's.
        index: where the sets are.
        sets: numbers of clusters, GLOBAL for the set of the whole corpus, DENSE for the whole model.
        out: folder, made if it is missing; a model goes to ``cluster-0003``, ``global`` or ``dense`` in it, with the ending
            ``.gguf`` if it is such a file.
        keep_ratio: share that is kept; None: the index's default.
        kind: one of FORMATS.
        weights: of a GGUF file, one of `gguf.TYPES` or `gguf.K_QUANTS`; a checkpoint keeps the model's dtype.
        compensated: use compensated sets where the index holds them.
        router: also write ``router.json``.
        force: replace models that are there.
        progress: receives messages and progress.

    Returns:
        The written paths, the router last.

    Raises:
        ExportError: the format cannot hold the model, something is in the way, or the disk is too small.
    """
    # 1) What is requested, and which of it is there.
    progress, out = shown(progress), Path(out)
    check_model(index, language_model.layers)
    check_dense(language_model.layers, "an export")
    named = keep_ratio is not None
    keep_ratio, compensated = wanted_sets(index, keep_ratio, compensated)
    check_ratio("keep ratio", keep_ratio)
    if keep_ratio == 1 and not named:
        progress.say(
            f"Note: the keep ratio of {index.name} is 1, so models keep all neurons; name a keep ratio for smaller ones."
        )
    written_as = weights if kind == "gguf" else language_model.dtype_name
    name, sha256 = index.manifest.model.name, index.manifest.identity()
    sources = [Source(name, index.name, sha256, each, keep_ratio, compensated, written_as) for each in sets]
    paths = [out / (source.title + (".gguf" if kind == "gguf" else "")) for source in sources]
    for path in paths:
        restore(Path(os.path.realpath(path)))
    missing = [place for place, path in enumerate(paths) if force or is_vacant(path)]
    for place in sorted({*range(len(paths))} - {*missing}):
        if not _holds(paths[place], sources[place], kind):
            raise ExportError(
                f"{paths[place]} exists already and holds something else than was requested; name another folder or set "
                "force."
            )
    if len(missing) < len(paths):
        progress.say(f"{len(paths) - len(missing)} of {counted(len(paths), 'model')} there already.")

    # 2) The missing models, then the router.
    def cut(source: Source) -> CompactWeights:
        selection = exported_selection(index, source.which, keep_ratio, compensated)
        return compact_weights(language_model, selection, one_width=kind == "hf")

    if missing:
        _write(language_model, index, [(sources[i], paths[i]) for i in missing], cut, kind, weights, progress)
    if router:
        template = template_of(language_model.tokenizer)
        paths.append(write_router(out, index, dict(zip(sets, paths, strict=True)), keep_ratio, compensated, template))
    return paths


def _write(
    language_model: LanguageModel,
    index: SemanticIndex,
    wanted: Sequence[tuple[Source, Path]],
    cut: Callable[[Source], CompactWeights],
    kind: str,
    weights: str,
    progress: Progress,
) -> None:
    """Write models one after the other, once it is clear that there is room for all."""
    out = wanted[0][1].parent
    first = cut(wanted[0][0])
    if kind == "gguf":
        gguf.check_exportable(language_model, weights)
        each = needed_bytes(first, gguf.bits_per_value(weights) / 8)
    else:
        checkpoint.check_exportable(language_model, first.has_bias)
        each = needed_bytes(first, language_model.model.dtype.itemsize)
    progress.say(
        f"Plan: {counted(len(wanted), 'model')} of about {readable_size(each)}, {readable_size(each * len(wanted))} on disk, "
        f"with {_span(first.widths)} of {index.manifest.model.d_ff} neurons a layer" + _padding_text(first)
    )
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < each * len(wanted):
        raise ExportError(
            f"{readable_size(free)} are free in {out}, expected {readable_size(each * len(wanted))}; free some space or "
            "export fewer clusters."
        )
    progress.start("Exporting", len(wanted), "models")
    try:
        for number, (source, path) in enumerate(wanted):
            cut_down = first if number == 0 else cut(source)
            with replacing(path) as part:
                if kind == "gguf":
                    gguf.export_gguf(language_model, cut_down, source, part, weights)
                else:
                    checkpoint.export_checkpoint(language_model, cut_down, source, part)
            progress.advance(1)
    finally:
        progress.finish()


def _holds(path: Path, source: Source, kind: str) -> bool:
    """Return whether a model is the one that would be written, however the index's place was put in words."""
    found, wanted = (
        (gguf.source_of(path), gguf.facts_of(source))
        if kind == "gguf"
        else (checkpoint.source_of(path), asdict(source))
    )
    return {**found, "index": None} == {**wanted, "index": None}


def _span(widths: Sequence[int]) -> str:
    return f"{min(widths)}" if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"


def _padding_text(weights: CompactWeights) -> str:
    """Say what one width for all layers costs, where it costs much."""
    share = weights.n_padding / sum(weights.widths)
    if share < 0.1:
        return "."
    return (
        f"; {share:.0%} of them are padding, as layers of this index differ in width and the format knows one: build with "
        "a uniform budget, or export as GGUF, to save it."
    )
