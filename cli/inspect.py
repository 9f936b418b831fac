"""`coreinfer-sim show`, `info`, `lookup` and `check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coreinfer_sim.base.decode_settings import ModelConfig
from coreinfer_sim.base.progress import counted

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries, status
from .profiles import profile_lines, profiles_summary
from .settings import Settings, set_option

if TYPE_CHECKING:
    from coreinfer_sim.index.asked import Asked
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.index.manifest import ModelInfo

_MOST_ASKED = 10
"""Topics that `info` lists by what servers were asked."""
_INDEX = click.argument("index", type=options.INDEX)
_ONE_OR_THE_ONLY = click.argument("index", type=options.INDEX, required=False, metavar="[NAME]")


def index_summary(index: SemanticIndex) -> dict[str, Any]:
    """Return what is in an index as plain JSON types, without the weight sketch."""
    m = index.manifest
    summary = {"index": index.name, **asdict(m), **m.as_dict(), "sha256": m.checksum()}
    del summary["model"]["weight_sketch"], summary["encoder"]["probe"]
    for entry in summary["compensation"]:
        entry["served_by_corpus"] = m.served_by_corpus(entry["keep_ratio"])
    summary.pop("profile", None)  # which stands for none in the file
    summary |= {"profiles": profiles_summary(m), "default_profile": m.default_profile.value}
    return {**summary, "clusters": [asdict(cluster) for cluster in index.clusters]}


def print_clusters(index: SemanticIndex) -> None:
    """Print a line or two on each cluster."""
    for cluster in index.clusters:
        click.echo(f"  {cluster.id:4d}  {cluster.size:6,d} prompts  {cluster.label}")
        for exemplar in cluster.exemplars[:2]:
            click.echo(f"        {'':14s}  e.g. {exemplar[:90]!r}")


@click.command()
@_ONE_OR_THE_ONLY
@click.argument("prompt", required=False)
@click.option("-k", default=3, show_default=True, type=click.IntRange(1), help="Number of clusters to show for PROMPT.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the map of the index's prompts, and PROMPT on it, into this .html, .png or .svg file.",
)
@options.as_json
def show(index: str | None, prompt: str | None, k: int, plot: Path | None, as_json: bool) -> None:
    """Show what is in an index, or a prompt's nearest clusters.

    NAME is the only index unless it is given.

    \b
    coreinfer-sim show my-index
    coreinfer-sim show my-index "How do stars form?" --plot map.html
    """
    from coreinfer_sim.index.index import SemanticIndex

    if plot is not None:
        from coreinfer_sim.base.plots import check_plot

        check_plot(plot)
    loaded = SemanticIndex.load(options.needed_index(index))
    if plot is not None:
        _ = loaded.map  # where there is none, nothing else is printed
    if prompt is None:
        _print_info(loaded, as_json)
    else:
        _print_lookup(loaded, prompt, k, as_json=as_json)
    if plot is not None:
        from coreinfer_sim.base.plots import save_plot

        save_plot(loaded.plot(prompt), plot)


@click.command()
@_ONE_OR_THE_ONLY
@options.as_json
def info(index: str | None, as_json: bool) -> None:
    """Show what is in an index."""
    from coreinfer_sim.index.index import SemanticIndex

    _print_info(SemanticIndex.load(options.needed_index(index)), as_json)


def _print_info(loaded: SemanticIndex, as_json: bool) -> None:
    from coreinfer_sim.index.asked import read_asked

    m = loaded.manifest
    asked = read_asked(m)
    if as_json:
        print_json(index_summary(loaded) | {"asked": None if asked is None else asked.as_dict()})
        return
    click.echo(f"{loaded.name}: format version {m.format_version}")
    click.echo(
        f"  model     {m.model.name} ({m.model.family}, {len(set(m.model.blocks))} layers{_experts(m.model)}, d_model "
        f"{m.model.d_model}, d_ff {m.model.d_ff}, {m.model.dtype})"
    )
    click.echo(f"  encoder   {m.encoder.name} ({m.encoder.dimension} dimensions, {m.encoder.metric})")
    click.echo(
        f"  corpus    {m.corpus.source}: {counted(m.corpus.n_sentences, 'prompt')}, {counted(m.corpus.n_tokens, 'token')}"
    )
    s = m.settings
    layers = sorted({m.model.blocks[each] for each in s.layers})
    click.echo(f"  settings  α {s.alpha}, β {s.beta}, γ {s.gamma}, seed {s.seed}, layers {_ranges(layers)}")
    for each in m.compensation:
        kept = [each.n_kept[layer] for layer in s.layers]
        trained = f", and trained on up to {each.distil_tokens:,}" if each.distil_tokens else ""
        click.echo(
            f"  fitted    keep ratio {each.keep_ratio:g}, {each.budget} budget ({min(kept)} to {max(kept)} "
            f"neurons a layer), up to {each.tokens:,} tokens a cluster{trained}"
        )
        served = m.served_by_corpus(each.keep_ratio)
        if each.plain:
            click.echo("            plain neurons after all, as compensation did harm on held-out texts")
        elif served and len(loaded) > 1:
            click.echo(
                f"            the whole corpus's set in clusters {_ranges(served)}, whose texts it serves better"
            )
    if m.map is not None:
        without = "" if m.map.texts else ", without their texts"
        click.echo(f"  map       {counted(m.map.n_prompts, 'prompt')} by {m.map.method}{without}")
    if m.histograms:
        click.echo(f"  thresholds of {', '.join(name.rpartition(' ')[0] for name in m.histograms)}")
    click.echo("  profiles  (the star is the default)")
    for line in profile_lines(m, m.default_profile):
        click.echo(f"          {line}")
    click.echo(f"  versions  {', '.join(f'{name} {value}' for name, value in m.versions.items())}")
    if asked is not None:
        _print_asked(loaded, asked)
    click.echo(f"{counted(len(loaded), 'cluster')}:")
    print_clusters(loaded)


def _print_asked(loaded: SemanticIndex, asked: Asked) -> None:
    """Say which topics servers were asked about, the most unfamiliar first: by such texts the index is to be extended."""
    n_unfamiliar = asked.unfamiliar.total()
    click.echo(
        f"  asked     {counted(asked.prompts.total(), 'prompt')} since {asked.since}, {n_unfamiliar:,} of them unfamiliar"
        + ("; texts like those near these topics are what to extend the index by" if n_unfamiliar else "")
    )
    order = sorted(asked.prompts, key=lambda number: (-asked.unfamiliar[number], -asked.prompts[number]))
    for number in order[:_MOST_ASKED]:
        label = loaded.clusters[number].label if number < len(loaded) else "gone"
        click.echo(
            f"    {number:4d}  {asked.prompts[number]:6,d} asked, {asked.unfamiliar[number]:,d} unfamiliar  {label}"
        )


def _experts(model: ModelInfo) -> str:
    """Say how many experts a layer of a mixture has; of unlike layers the most."""
    n = max((expert for _, expert in model.places or ()), default=-1) + 1
    return f" of {counted(n, 'expert')}" if n else ""


def _ranges(numbers: list[int]) -> str:
    """Write [4, 5, 6, 9] as ``4-6, 9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@click.command()
@_ONE_OR_THE_ONLY
@click.option(
    "--model", callback=options.reachable, metavar="NAME", help="Also check that the index belongs to this model."
)
@set_option("model")
@options.as_json
def check(index: str | None, model: str | None, settings: Settings, as_json: bool) -> None:
    """Check an index: files, encoder, and with --model the model.

    Of files these are format, sizes and checksums; of a model the tokenizer and a sample of the weights.
    """
    from coreinfer_sim.index.checks import verified_files
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.index.manifest import INDEX_FILES

    quiet_libraries()
    loaded = SemanticIndex.load(options.needed_index(index))
    with status("Checking the files"):  # loading leaves those of compensated sets until they are needed
        verified_files(loaded.folder, loaded.manifest, loaded.manifest.files.keys() - set(INDEX_FILES))
    checks = ["format version", "file sizes", "checksums"]
    with status("Checking the encoder"):
        _ = loaded.encoder
    checks.append("encoder")
    if model is not None:
        from coreinfer_sim.choosing.compatibility import check_model
        from coreinfer_sim.generation.opening import open_model
        from coreinfer_sim.models.loading import tokenizer_hash

        with status("Loading the model"):
            language_model = open_model(loaded, model, settings.make(ModelConfig), progress=ConsoleProgress())
        check_model(loaded, language_model.layers, tokenizer_hash(language_model.tokenizer))
        checks += ["sampled model weights", "tokenizer"]
    if as_json:
        print_json({"index": loaded.name, "valid": True, "checked": checks})
    else:
        click.echo(f"{loaded.name} is valid: {', '.join(checks)}")


verify = click.Command(
    "verify", params=check.params, callback=check.callback, hidden=True, help="The former name of check."
)


def _key(index: SemanticIndex, number: int) -> str:
    """Return what JSON calls an MLP: its layer, and of an expert ``layer.expert``."""
    places = index.manifest.model.places
    return str(number) if places is None else ".".join(str(each) for each in places[number] if each >= 0)


@click.command()
@_INDEX
@click.argument("prompt")
@click.option("-k", default=3, show_default=True, type=click.IntRange(1), help="Number of clusters to show.")
@click.option("--keep-ratio", type=float, help="Share of d_ff to show.  [default: the index's]")
@click.option("--score", type=click.Choice(["energy", "paper"]), default="energy", show_default=True)
@click.option("--layers", metavar="SLICE", help="Layers whose ids are shown.  [default: those of the index]")
@click.option("--ids", is_flag=True, help="Show the core-neuron ids; --json always holds them.")
@options.as_json
def lookup(
    index: str, prompt: str, k: int, keep_ratio: float | None, score: str, layers: str | None, ids: bool, as_json: bool
) -> None:
    """Show a prompt's nearest clusters and core neurons."""
    from coreinfer_sim.index.index import SemanticIndex

    _print_lookup(SemanticIndex.load(index), prompt, k, keep_ratio, score, layers, ids, as_json)


def _print_lookup(
    loaded: SemanticIndex,
    prompt: str,
    k: int,
    keep_ratio: float | None = None,
    score: str = "energy",
    layers: str | None = None,
    ids: bool = False,
    as_json: bool = False,
) -> None:
    from coreinfer_sim.base.errors import PromptError
    from coreinfer_sim.choosing.index_sets import IndexSets

    if not options.readable(prompt).strip():
        raise PromptError("the prompt is empty, expected some text.")
    quiet_libraries()
    matches = loaded.lookup(prompt, k=min(k, len(loaded)))
    sets = IndexSets(loaded, keep_ratio, score, layers)
    if sets.keep_ratio == 1 and keep_ratio is None:  # dense decode keeps what was promised, and has no sets to show
        sets = IndexSets(loaded, loaded.manifest.settings.gamma, score, layers)
    chosen = sets.of_match(matches[0])
    neurons = chosen.ids
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "matches": [{**asdict(match), "confident": match.confident} for match in matches],
                "core_neurons": {_key(loaded, layer): values.tolist() for layer, values in neurons.items()},
            }
        )
        return
    for match in matches:
        familiar = "" if match.confident else "  (unfamiliar)"
        click.echo(f"  {match.similarity:6.3f}  cluster {match.cluster:4d}  {match.label}{familiar}")
    model = loaded.manifest.model
    if not neurons:
        click.echo(f"core neurons of cluster {matches[0].cluster}: all {model.d_ff} of every layer")
        return
    counts = {len(values) for values in neurons.values()}
    spread = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    click.echo(
        f"core neurons of cluster {matches[0].cluster}: {spread} of {model.d_ff} in each of "
        f"{len(neurons)} {'layers' if model.places is None else 'experts'}{', compensated' if chosen.compensation else ''}"
    )
    if ids:
        for layer, values in neurons.items():
            click.echo(f"  {model.title(layer)}: {', '.join(map(str, values.tolist()))}")
