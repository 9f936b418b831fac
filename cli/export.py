"""`coreinfer-sim export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, size_text, status

_D = {"show_default": True}
_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k")


def _sets(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> list[int | str]:
    for value in values:
        if value not in ("all", "global", "dense") and not value.isdecimal():
            raise click.BadParameter(f"{value!r} is no cluster's number, nor all, global or dense.")
    return [int(value) if value.isdecimal() else value for value in values]


@click.command()
@click.argument("index", type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the models.")
@click.option(
    "--cluster",
    "wanted",
    multiple=True,
    required=True,
    callback=_sets,
    metavar="N|all|global|dense",
    help="Whose set; global: the whole corpus's; dense: the whole model. May be repeated.",
)
@click.option("--format", "kind", type=click.Choice(["hf", "gguf"]), default="hf", **_D, help="Checkpoint or GGUF.")
@click.option("--type", "weights", type=click.Choice(_TYPES), default="bf16", **_D, help="Of a GGUF file's matrices.")
@click.option("--keep-ratio", type=float, help="Share that is kept.  [default: the index's]")
@click.option("--compensation/--no-compensation", default=True, **_D, help="Take compensated sets where there are any.")
@click.option("--manifest", is_flag=True, help="Also write router.json: centroids, encoder and each cluster's file.")
@click.option("--model", metavar="NAME", help="Hub id, checkpoint folder or GGUF file.  [default: the index's]")
@click.option(
    "--dtype",
    type=click.Choice(["stored", "float32", "bfloat16", "float16"]),
    default="stored",
    **_D,
    help="Type of a checkpoint's weights; stored: the model's own, bfloat16 for GGUF.",
)
@options.device
@click.option(
    "--force", is_flag=True, help="Replace models that are there; without, those that are what was asked for are kept."
)
@click.option("--quiet", is_flag=True, help="No plan and no progress.")
@options.as_json
@click.pass_context
def export(
    ctx: click.Context, index: str, out: Path, wanted: list[int | str], model: str | None, as_json: bool, **given: Any
) -> None:
    """Write clusters of INDEX as ordinary, smaller models.

    \b
    coreinfer-sim export my-index --cluster 3 --out exported
    coreinfer-sim export my-index --cluster all --cluster dense --format gguf --type q8_0 --manifest --out exported
    """
    from coreinfer_sim.export.exporting import export as write
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import load_model

    if given["kind"] == "hf" and ctx.get_parameter_source("weights") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--type is of GGUF files; give --format gguf, or --dtype for a checkpoint.")
    quiet_libraries()
    loaded = SemanticIndex.load(index)
    sets: list[int | str] = []
    for each in wanted:
        sets += [which for which in (range(len(loaded)) if each == "all" else [each]) if which not in sets]
    for which in sets:
        if isinstance(which, int):
            loaded.check_cluster(which)
    with status("Loading the model"):
        language_model = load_model(model or loaded.manifest.model.name, given["dtype"], given["device"])
    paths = write(
        language_model,
        loaded,
        sets,
        out,
        keep_ratio=given["keep_ratio"],
        kind=given["kind"],
        weights=given["weights"],
        compensated=given["compensation"],
        router=given["manifest"],
        force=given["force"],
        progress=ConsoleProgress(given["quiet"]),
    )
    sizes = {str(path): _size(path) for path in paths}
    if as_json:
        print_json([{"path": path, "bytes": n_bytes} for path, n_bytes in sizes.items()])
        return
    for path, n_bytes in sizes.items():
        click.echo(f"{path}  {size_text(n_bytes)}")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
