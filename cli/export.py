"""`coreinfer-sim export`."""

from __future__ import annotations

from pathlib import Path

import click

from coreinfer_sim.base.decode_settings import ModelConfig

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, size_text, status
from .settings import Settings, set_option

_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k")


def _sets(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> list[int | str]:
    for value in values:
        if value not in ("all", "global", "dense") and not value.isdecimal():
            raise click.BadParameter(f"{value!r} is no cluster's number, nor all, global or dense.")
    return [int(value) if value.isdecimal() else value for value in values]


@click.command()
@click.argument("index", type=options.INDEX)
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
@click.option(
    "--format", "kind", type=click.Choice(["hf", "gguf"]), default="hf", show_default=True, help="Checkpoint or GGUF."
)
@click.option("--type", "weights", type=click.Choice(_TYPES), help="Of a GGUF file's matrices.  [default: bf16]")
@click.option("--keep-ratio", type=float, help="Share that is kept.  [default: the index's]")
@click.option(
    "--compensation/--no-compensation",
    default=True,
    show_default=True,
    help="Take compensated sets where there are any.",
)
@click.option("--manifest", is_flag=True, help="Also write router.json: centroids, encoder and each cluster's file.")
@options.model
@click.option(
    "--force", is_flag=True, help="Replace models that are there; without, those that are what was asked for are kept."
)
@click.option("--quiet", is_flag=True, help="No plan and no progress.")
@set_option("model")
@options.as_json
def export(
    index: str,
    out: Path,
    wanted: list[int | str],
    kind: str,
    weights: str | None,
    keep_ratio: float | None,
    compensation: bool,
    manifest: bool,
    model: str | None,
    force: bool,
    quiet: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Write clusters of an index as ordinary, smaller models.

    \b
    coreinfer-sim export my-index --cluster 3 --out exported
    coreinfer-sim export my-index --cluster all --cluster dense --format gguf --type q8_0 --manifest --out exported
    """
    if kind == "hf" and weights is not None:
        raise click.UsageError("--type is of GGUF files; give --format gguf, or --set model.dtype=… for a checkpoint.")
    loading = settings.make(ModelConfig, {"dtype": "stored"})

    from coreinfer_sim.export.export import export as write
    from coreinfer_sim.generation.opening import open_model
    from coreinfer_sim.index.index import SemanticIndex

    quiet_libraries()
    loaded = SemanticIndex.load(index)
    sets: list[int | str] = []
    for each in wanted:
        sets += [which for which in (range(len(loaded)) if each == "all" else [each]) if which not in sets]
    for which in sets:
        if isinstance(which, int):
            loaded.check_cluster(which)
    with status("Loading the model"):
        language_model = open_model(loaded, model, loading, progress=ConsoleProgress(quiet))
    paths = write(
        language_model,
        loaded,
        sets,
        out,
        keep_ratio=keep_ratio,
        kind=kind,
        weights=weights or "bf16",
        compensated=compensation,
        router=manifest,
        force=force,
        progress=ConsoleProgress(quiet),
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
