"""`coreinfer-sim push` and `pull`: indexes on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .console import print_json, quiet_libraries, status

if TYPE_CHECKING:
    from coreinfer_sim.index.manifest import ModelInfo


@click.command()
@click.argument("index", type=options.INDEX, metavar="NAME")
@click.argument("repository", metavar="USER/NAME")
@click.option(
    "--license", "licence", metavar="ID", help="Licence of the index, such as apache-2.0.  [default: not stated]"
)
@click.option("--private", is_flag=True, help="Let nobody but you see a repository that is made.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.as_json
def push(index: str, repository: str, licence: str | None, private: bool, yes: bool, as_json: bool) -> None:
    """Upload an index to the Hugging Face hub.

    A page is made from its manifest, and uploaded with it. It takes the token of 'hf auth login', or of HF_TOKEN.

    \b
    coreinfer-sim push my-index ada/my-index --license apache-2.0
    """
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.reporting.sharing import check_repository
    from coreinfer_sim.reporting.sharing import push as upload

    check_repository(repository)
    loaded = SemanticIndex.load(index)
    holds_texts = any(cluster.exemplars for cluster in loaded.clusters)
    if not yes:
        texts = "beginnings of texts of its corpus are" if holds_texts else "words of its corpus are"
        who = "you alone" if private else "everybody"
        click.confirm(f"{repository} may be read by {who}, and {texts} in it. Upload?", abort=True, err=True)
    quiet_libraries()
    with status("Uploading"):
        address = upload(
            loaded, repository, licence=licence, commands=_commands(loaded.manifest.model, repository), private=private
        )
    if as_json:
        print_json({"index": loaded.name, "repository": repository, "address": address})
    else:
        click.echo(f"{loaded.name} is at {address}; 'coreinfer-sim pull {repository}' fetches it.")


def _commands(model: ModelInfo, repository: str) -> list[str]:
    """Return the commands that fetch an index and ask it; a model that lies on no hub is to be named."""
    from coreinfer_sim.index.places import is_local

    place = f" --model {Path(model.name).name}" if is_local(model) else ""
    name = repository.rpartition("/")[2]
    return [f"coreinfer-sim pull {repository}", f'coreinfer-sim run --index {name}{place} "How do stars form?"']


@click.command()
@click.argument("repository", metavar="USER/NAME")
@click.option(
    "--out", metavar="NAME", help="A name for it, or a path with a separator.  [default: the NAME on the hub]"
)
@click.option("--force", is_flag=True, help="Replace an index that is there.")
@options.as_json
def pull(repository: str, out: str | None, force: bool, as_json: bool) -> None:
    """Fetch an index from the Hugging Face hub.

    Every file of it is checked.

    \b
    coreinfer-sim pull ada/my-index
    """
    from coreinfer_sim.reporting.sharing import pull as fetch

    quiet_libraries()
    with status("Fetching"):
        place = fetch(repository, out, force=force)
    if as_json:
        print_json({"repository": repository, "index": place.name, "folder": str(place)})
    else:
        click.echo(f"{place.name} is there; 'coreinfer-sim show {place.name}' says what is in it.")
