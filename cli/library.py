"""`coreinfer-sim list` and `rm`: the indexes that have a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coreinfer_sim.base.errors import ConfigError, CoreInferSimError
from coreinfer_sim.base.progress import readable_size

from . import options
from .console import print_json


@click.command("list")
@options.as_json
def list_(as_json: bool) -> None:
    """List your indexes; the one with a star is the default."""
    from coreinfer_sim.index.names import indexes_folder, known_indexes

    try:
        chosen = options.index_of(None)
    except ConfigError:  # there are several, and none is chosen
        chosen = None
    rows = [_row(name, folder, name == chosen) for name, folder in known_indexes().items()]
    if as_json:
        print_json({"folder": str(indexes_folder()), "indexes": rows})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        star = "*" if row["default"] else " "
        about = row["error"] or (
            f"{row['n_clusters']:4d} clusters  {row['n_prompts']:8,d} prompts  {readable_size(row['bytes']):>10s}  {row['model']}"
        )
        click.echo(f"{star} {row['name']:{width}s}  {about}")
    click.echo(
        f"They lie in {indexes_folder()}; demo comes with the package unless you make one of that name.", err=True
    )


def _row(name: str, folder: Path, is_default: bool) -> dict[str, Any]:
    """Say what an index is by its manifest alone."""
    from coreinfer_sim.index.checks import read_manifest

    row: dict[str, Any] = {"name": name, "default": is_default, "folder": str(folder), "error": None}
    try:
        manifest = read_manifest(folder)
    except CoreInferSimError as error:
        return {**row, "error": str(error)}
    return {
        **row,
        "model": Path(manifest.model.name).name,
        "n_clusters": manifest.settings.n_clusters,
        "n_prompts": manifest.corpus.n_sentences,
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


@click.command()
@click.argument("name", type=options.INDEX)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Delete one of your indexes.

    What a broken-off build of it has left goes, too. Indexes elsewhere are ordinary folders.
    """
    from coreinfer_sim.base.files import remove
    from coreinfer_sim.index.names import own_folder, unfinished

    folder = own_folder(name)
    if not yes:
        click.confirm(f"Delete {folder}?", abort=True, err=True)
    for each in (folder, unfinished(folder)):
        remove(each)
    click.echo(f"{name} is deleted.", err=True)
