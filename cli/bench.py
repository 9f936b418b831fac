"""`coreinfer-sim bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coreinfer_sim.base.decode_settings import ModelConfig
from coreinfer_sim.base.errors import ConfigError

from . import options
from .console import ConsoleProgress, print_json, quiet_libraries
from .settings import Settings, set_option


@click.command()
@click.option("--model", callback=options.reachable, metavar="NAME", help="Hub id, checkpoint folder or GGUF file.")
@click.option("--shape", metavar="NAME[:layers=N]", help="Random weights of a real architecture, for speed only.")
@click.option(
    "--index", type=options.INDEX, metavar="NAME", help="Index by name or folder; sparse, hybrid and global need it."
)
@click.option(
    "--contender",
    "contenders",
    multiple=True,
    metavar="SPEC",
    help="May be repeated.  [default: dense, sparse:0.4 (random:0.4 without an index), llamacpp:bf16 if installed]",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of the prompts.")
@click.option(
    "--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens that each run generates."
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Turns of each contender, after one to warm up.",
)
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to cut prompts from, each from another line on.  [default: a text about many things]",
)
@click.option("--threads", type=click.IntRange(1), help="Of each contender.  [default: one for each core]")
@click.option("--fresh", is_flag=True, help="Start each contender anew in each round: one at a time in memory.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Keep GGUF files of the model here.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random sets and prompts.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write everything as JSON.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw into this .html, .png or .svg file.",
)
@click.option(
    "--llama-bench",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="llama.cpp's own program, as built for this processor; it runs the contenders llamacpp.",
)
@click.option("--build-llamacpp", is_flag=True, help="Build that program first, once; needs cmake and a compiler.")
@set_option("model")
@options.as_json
def bench(
    model: str | None,
    shape: str | None,
    index: str | None,
    contenders: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    prompt_file: Path | None,
    threads: int | None,
    fresh: bool,
    folder: Path | None,
    seed: int,
    out: Path | None,
    plot_path: Path | None,
    llama_bench: Path | None,
    build_llamacpp: bool,
    settings: Settings,
    as_json: bool,
) -> None:
    """Compare the speed of programs that take turns.

    Each runs in a process of its own.

    \b
    SPEC is one of
      dense[:DTYPE]          transformers' own generate
      ours-dense[:DTYPE]     our runtime without sparsity
      MODE[:KEEP_RATIO][:DTYPE][:int8|int4][:OPTION=VALUE…]
                             our runtime; MODE is sparse (similarity), hybrid, stability, global or random
      llamacpp[:TYPE]        llama.cpp on the same weights: bf16, f16, f32, q8_0, q4_0,
                             or file, the GGUF file that the model is; without --llama-bench by a ready-made package
      offload[:SHARE][:DTYPE]
                             accelerate, with that share of the weights in memory and the rest on disk

    \b
    coreinfer-sim bench --model ./my-model --index my-index
    coreinfer-sim bench --model ./my-model --contender dense:float32 --contender random:0.4 --contender llamacpp:q8_0
    coreinfer-sim bench --shape llama-3.1-8b:layers=4 --plot speed.png --out speed.json
    """
    from coreinfer_sim.bench.shapes import parse_shape
    from coreinfer_sim.bench.specs import parse_specs

    try:
        specs = parse_specs(contenders)
        chosen = None if shape is None else parse_shape(shape)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    if (model is None) == (shape is None):
        raise click.UsageError("give --model or --shape, one of them.")
    from coreinfer_sim.base.files import write_json
    from coreinfer_sim.base.plots import check_plot
    from coreinfer_sim.bench.bench import BenchSettings, default_specs
    from coreinfer_sim.bench.bench import bench as run
    from coreinfer_sim.bench.native import build_llama_bench, check_llama_bench
    from coreinfer_sim.bench.plot import plot
    from coreinfer_sim.bench.programs import Subject

    quiet_libraries()
    if plot_path is not None:
        check_plot(plot_path)
    loading = settings.make(ModelConfig)
    native = check_llama_bench(llama_bench) if llama_bench is not None else None
    if build_llamacpp:
        native = build_llama_bench(ConsoleProgress())
    subject = Subject(model, chosen, index, loading.encoder)
    result = run(
        subject,
        specs or parse_specs(default_specs(subject, native is not None)),
        BenchSettings(
            n_prompt=prompt_tokens,
            n_new=new_tokens,
            rounds=rounds,
            n_threads=threads,
            device=loading.device,
            fresh=fresh,
            seed=seed,
            llama_bench=native,
        ),
        text=None if prompt_file is None else prompt_file.read_text(encoding="utf-8", errors="replace"),
        folder=folder,
        progress=ConsoleProgress(),
    )
    if out is not None:
        write_json(out, result)
    if plot_path is not None:
        plot(result, plot_path)
    if as_json:
        print_json(result)
    else:
        print_table(result)


def print_table(result: dict[str, Any]) -> None:
    """Print a line a contender, and what went wrong below."""
    from coreinfer_sim.base.progress import counted

    width = max(18, *(len(row["contender"]) for row in result["contenders"]))
    bandwidth = result["bandwidth_gb_per_s"]["highest"]
    click.echo(
        f"{result['model']}: {result['prompt_tokens']} prompt tokens, {result['new_tokens']} new ones, median of "
        f"{counted(result['rounds'], 'round')} on {counted(result['threads'], 'thread')}; memory is read at {bandwidth:.1f} GB/s"
    )
    titles = ("lookup", "swap", "prefill", "first", "tokens/s", "lowest-highest", "peak MB", "MB/token", "of limit")
    widths = (9, 9, 9, 9, 9, 16, 9, 9, 9)
    click.echo(f"{'contender':{width}s}" + "".join(f" {t:>{w}s}" for t, w in zip(titles, widths, strict=True)))
    for row in result["contenders"]:
        if "error" in row:
            continue
        spread = f"{row['tokens_per_second_lowest']:.1f}-{row['tokens_per_second_highest']:.1f}"
        cells = (
            *(f"{1000 * row[f'{what}_seconds']:.1f} ms" for what in ("lookup", "swap", "prefill", "first_token")),
            f"{row['tokens_per_second']:.1f}",
            spread,
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['bytes_per_token'] / 1e6:,.1f}",
            f"{row['share_of_bandwidth']:.0%}",
        )
        click.echo(f"{row['contender']:{width}s}" + "".join(f" {c:>{w}s}" for c, w in zip(cells, widths, strict=True)))
    for row in result["contenders"]:
        if "error" in row:
            click.echo(f"{row['contender']:{width}s} was not measured: {row['error']}")
        elif "crashed" in row:
            click.echo(f"{row['contender']:{width}s} was measured in part: {row['crashed']}")
