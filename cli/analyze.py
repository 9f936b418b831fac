"""`coreinfer-sim analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coreinfer_sim.base.analysis_settings import AnalysisConfig, Experiment
from coreinfer_sim.base.decode_settings import ModelConfig
from coreinfer_sim.base.settings import CorpusConfig

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries
from .settings import Settings, set_option

if TYPE_CHECKING:
    from coreinfer_sim.analysis.analyze import Analysis

_NUMBERS = ("value", "low", "high")


@click.command()
@click.argument("experiment", type=click.Choice([each.value for each in Experiment]))
@click.argument("corpus")
@click.option("--model", required=True, metavar="NAME", help="Hub id, checkpoint folder or GGUF file.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Use at most N texts.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the numbers into this .html, .png or .svg file.",
)
@set_option("analyze", "corpus", "model")
@options.as_json
def analyze(
    experiment: str,
    corpus: str,
    model: str,
    limit: int | None,
    plot_path: Path | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Ask one question about the core neurons of a model on CORPUS, which is as for build-index.

    \b
    alpha-beta   perplexity where a token has its core neurons alone, or its text's
    stability    how soon a text's core neurons are those that it ends with
    similarity   whether texts of like meaning have like core neurons
    clusters     whether a cluster's texts have more of them in common
    layers       how activations differ by layer
    information  how much of what a token needs is known before it comes

    Numbers have a 95 % interval, from some hundred texts on. What was broken off goes on when the same command runs again.

    \b
    coreinfer-sim analyze stability texts.jsonl --model ./my-model --plot stability.png
    """
    of_analysis = settings.make(AnalysisConfig)
    of_corpus = settings.make(CorpusConfig, source=corpus, limit=limit)
    loading = settings.make(ModelConfig)

    from coreinfer_sim.base.plots import check_plot

    if plot_path is not None:
        check_plot(plot_path)

    from coreinfer_sim.analysis.analyze import analyze as run
    from coreinfer_sim.index.encoder import DEFAULT_ENCODER

    quiet_libraries()
    found = run(
        experiment,
        model,
        of_corpus,
        of_analysis,
        encoder=loading.encoder or DEFAULT_ENCODER,
        dtype=loading.dtype,
        device=loading.device,
        progress=ConsoleProgress(),
    )
    if plot_path is not None:
        from coreinfer_sim.analysis.plot import plot

        plot(found, plot_path)
    if as_json:
        print_json(found.as_dict())
    else:
        _print_table(found)


def _print_table(found: Analysis) -> None:
    """Print the numbers that are of all layers; the others are in the JSON."""
    rows = [row for row in found.rows if "layer" not in row and row.get("layers", "all") == "all"]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in (*_NUMBERS, "layers")))
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(names))]
    numbers = ["value  (95 % interval)", *(_interval(row) for row in rows)]
    for row, number in zip(cells, numbers, strict=True):
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), number]))
    for remark in found.remarks:
        click.echo(f"{remark}.")


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _interval(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "–"
    spread = "" if row["low"] is None else f"  ({row['low']:.4g} to {row['high']:.4g})"
    return f"{row['value']:.4g}{spread}"
