"""`coreinfer-sim cache`."""

from __future__ import annotations

import click

from . import options
from .console import print_json


@click.command()
@click.option("--clear", is_flag=True, help="Delete everything in it. Programs that use it go on.")
@options.as_json
def cache(clear: bool, as_json: bool) -> None:
    """List what is kept for later starts, or clear it.

    Everything in it is made anew when it is needed. The folder is ~/.cache/coreinfer_sim (elsewhere than on Linux the
    system's), or COREINFER_SIM_CACHE.
    """
    from coreinfer_sim.base.files import cache_folder
    from coreinfer_sim.base.progress import counted, readable_size
    from coreinfer_sim.models.kept import clear as cleared
    from coreinfer_sim.models.kept import kept

    found = cleared() if clear else kept()
    total = sum(each.n_bytes for each in found)
    if as_json:
        print_json({"folder": str(cache_folder("")), "cleared": clear, "entries": [each.as_dict() for each in found]})
        return
    if not clear:
        for each in found:
            click.echo(f"{readable_size(each.n_bytes):>10s}  {each.date}  {each.what}")
    done = "deleted from" if clear else "in"
    click.echo(f"{counted(len(found), 'item')}, {readable_size(total)}, {done} {cache_folder('')}.")
