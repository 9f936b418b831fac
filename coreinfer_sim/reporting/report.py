"""A report: one page that says what an index is, whether it can be trusted, and what was measured with it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError, MissingMapError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.files import check_folder, write_atomic
from coreinfer_sim.base.plain import plain
from coreinfer_sim.base.plots import page, svg_of
from coreinfer_sim.base.progress import counted
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.plot import map_chart
from coreinfer_sim.reporting.charts import layers_chart, topics_chart
from coreinfer_sim.reporting.comparing import Comparison, compare, facts_of
from coreinfer_sim.reporting.notices import notices_of
from coreinfer_sim.reporting.overlap import Overlap, overlap
from coreinfer_sim.reporting.results import Measured, read_measured

_COMPARISON = "comparison"
_PARTS = (
    ("about", "What it was built from"),
    ("notices", "What to look at"),
    ("map-of-prompts", "Map"),
    ("topics", "Topics"),
    ("overlap", "What topics have in common"),
    (_COMPARISON, "Beside another index"),
    ("quality", "Quality"),
    ("speed", "Speed"),
    ("versions", "Versions and commands"),
)


def check_report(out: Path) -> None:
    """Raise ConfigError unless a report can be written to ``out``, before the work that it would show."""
    if out.suffix != ".html":
        raise ConfigError(f"the report is to be {out.name}, expected a name that ends in .html.")
    check_folder(out)
    require("a report", "plots", "altair", "jinja2", "vl_convert")


def write_report(
    index: SemanticIndex,
    results: Sequence[Path],
    out: Path,
    commands: Sequence[tuple[str, str]] = (),
    other: SemanticIndex | None = None,
) -> None:
    """Write a report as one page of HTML that needs no network.

    Texts, labels and names are a stranger's: they are escaped, and the page's policy lets no script run but its own.

    Args:
        index: to report on.
        results: JSON files of `evaluate`, `tune` and `bench`, in the order in which they are shown.
        out: an .html file; replaced in one step.
        commands: what a reader may want to do next, and how.
        other: an index to compare with.

    Raises:
        ConfigError: the file cannot be written, or one of the results is none.
    """
    check_report(out)
    measured = [read_measured(path) for path in results]
    chart = None if index.manifest.map is None else map_chart(index.map, index.clusters)
    comparison = None if other is None else compare(index, other, facts_of(index), facts_of(other))
    body = _body(index, measured, chart, commands, comparison)
    content = page(
        f"{plain(index.name)}: topics and measurements",
        body,
        {} if chart is None else {"plot-map": chart},
        files(__package__).joinpath("report.css").read_text(encoding="utf-8"),
    ).encode("utf-8", "replace")
    write_atomic(out, lambda part: part.write_bytes(content))


def _body(
    index: SemanticIndex,
    measured: list[Measured],
    chart: Any,
    commands: Sequence[tuple[str, str]],
    comparison: Comparison | None,
) -> str:
    """Return the page's own part."""
    from jinja2 import Environment, StrictUndefined

    manifest, found = index.manifest, overlap(index)
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        name=index.name,
        summary=f"{counted(len(index), 'topic')} over {counted(manifest.corpus.n_sentences, 'prompt')}.",
        parts=[part for part in _PARTS if part[0] != _COMPARISON or comparison is not None],
        comparison=comparison,
        facts=facts_of(index),
        notices=notices_of(index),
        map=None if chart is None else _drawn(chart),
        map_note=_map_note(index),
        no_map=_no_map(index),
        topics=[_topic(cluster) for cluster in index.clusters],
        n_prompts=max(1, manifest.corpus.n_sentences),
        overlap_note=_overlap_note(found),
        overlaps=[_drawn(each(found)) for each in (topics_chart, layers_chart)] if found.of_layers else [],
        measured=[
            (id_, title, nothing, [(each, _drawn(each.chart)) for each in measured if each.is_speed is is_speed])
            for id_, title, nothing, is_speed in (
                ("quality", "Quality", "No results of quality were given.", False),
                ("speed", "Speed", "No results of speed were given.", True),
            )
        ],
        versions=[*manifest.versions.items()],
        commands=commands,
        version=version("coreinfer-sim"),
    )


def _shown(value: Any) -> Any:
    """Return what the template shall show for a value: of a text, be it a stranger's, `plain`; drawings are no mere text."""
    return plain(value) if type(value) is str else value


def _drawn(chart: Any) -> Any:
    """Return a chart as a drawing that the template takes as it is: its texts are escaped by who draws it."""
    from markupsafe import Markup

    return Markup(svg_of(chart))


def _map_note(index: SemanticIndex) -> str:
    info, n = index.manifest.map, index.manifest.corpus.n_sentences
    if info is None:
        return ""
    which = f"all {n:,} prompts" if info.n_prompts == n else f"{info.n_prompts:,} of {n:,} prompts, drawn at random"
    return f"By {info.method}, {which}; what is alike in meaning lies near. Numbers are those of the topics."


def _no_map(index: SemanticIndex) -> str:
    try:
        _ = index.map
    except MissingMapError as error:
        return str(error)
    return ""


def _topic(cluster: Cluster) -> dict[str, Any]:
    levels = {float(level): value for level, value in cluster.similarity_quantiles.items()}
    median = levels.get(0.5, sum(levels.values()) / len(levels))
    return {**vars(cluster), "median": median}


def _overlap_note(found: Overlap) -> str:
    if not found.of_layers:
        return "There is one topic, which has nothing to be compared with."
    mean = sum(found.of_layers.values()) / len(found.of_layers)
    lowest = min(found.of_layers, key=lambda layer: found.of_layers[layer])
    return (
        f"Of each layer, the {found.share:.0%} of neurons that give a topic's tokens most energy are its core neurons. Two "
        f"topics have {mean:.0%} of them in common on average, {found.of_layers[lowest]:.0%} in layer {lowest}, where it is "
        f"least; by chance it would be {found.share:.0%}."
    )
