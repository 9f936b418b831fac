"""`coreinfer-sim report`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from . import options
from .console import status


@click.command()
@click.argument("index", type=options.INDEX, metavar="NAME")
@click.argument("results", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="Write the page here.",
)
@click.option("--compare", "other", type=options.INDEX, metavar="NAME", help="Put another index beside it.")
def report(index: str, results: tuple[Path, ...], out: Path, other: str | None) -> None:
    """Write one page on an index and what was measured.

    It says what the index was built from, and shows its map, its topics, and what RESULTS hold. These are JSON files of 'evaluate
    --out', 'tune --json' and 'bench --out'. The page needs no network.

    \b
    coreinfer-sim report my-index
    coreinfer-sim report my-index quality.json speed.json --compare demo -o my-index.html
    """
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.reporting.report import check_report, write_report

    check_report(out)
    with status("Writing the report"):
        beside = None if other is None else SemanticIndex.load(other)
        write_report(SemanticIndex.load(index), results, out, _commands(index, results, other, out), beside)
    click.echo(f"{out} is written; open it in a browser.")


def _commands(index: str, results: tuple[Path, ...], other: str | None, out: Path) -> list[tuple[str, str]]:
    """Return what a reader may want to do, and the commands for that."""
    name = shlex.quote(index)
    files = "".join(f" {shlex.quote(str(path))}" for path in results)
    files += f" --compare {shlex.quote(other)}" if other is not None else ""
    return [
        (
            "Show a prompt's topics, and where it stands on the map",
            f"coreinfer-sim show {name} 'PROMPT' --plot map.html",
        ),
        ("Answer a prompt", f"coreinfer-sim run 'PROMPT' --index {name}"),
        ("Check the files", f"coreinfer-sim check {name}"),
        ("Measure quality", f"coreinfer-sim evaluate ROWS --index {name} --out quality.json"),
        ("Measure speed", f"coreinfer-sim bench --model MODEL --index {name} --out speed.json"),
        ("Write this page", f"coreinfer-sim report {name}{files} --out {shlex.quote(str(out))}"),
    ]
