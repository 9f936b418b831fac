"""`coreinfer-sim generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coreinfer_sim.base.errors import ConfigError, CoreInferSimError, PromptError
from coreinfer_sim.base.progress import counted

from . import budgeted, llamacpp, options
from .console import note_plain_sets, print_json, quiet_libraries, size_text, status

if TYPE_CHECKING:
    from coreinfer_sim.generation.text import Generation, TextGenerator

_D = {"show_default": True}
_EFFECTIVE = {
    "score": ("similarity", "hybrid", "stability", "global"),
    "fallback": ("similarity",),
    "keep_ratio": ("similarity", "hybrid", "stability", "global", "random"),
}
"""Modes in which an option does something."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@click.command()
@click.argument("prompt", required=False)
@click.option("--file", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One prompt a line.")
@click.option("--index", type=click.Path(), help="Index folder; similarity, hybrid and global need it.")
@click.option("--model", metavar="NAME", help="Hub id, checkpoint folder or GGUF file.  [default: the index's model]")
@click.option(
    "--mode",
    type=click.Choice(["similarity", "hybrid", "stability", "global", "random", "dense"]),
    default="similarity",
    **_D,
    help="Where the kept neurons come from.",
)
@click.option(
    "--keep-ratio",
    type=float,
    help="Share of neurons that decode keeps; of MLP bytes in compensated sets.  [default: the index's]",
)
@click.option("--score", type=click.Choice(["energy", "paper"]), default="energy", **_D, help="What ranks neurons.")
@click.option(
    "--fallback",
    type=click.Choice(["hybrid", "dense", "global", "none"]),
    help="What similarity does for an unfamiliar prompt.  [default: hybrid; global if compensated or with sparse prefill]",
)
@click.option(
    "--compensation/--no-compensation",
    default=True,
    **_D,
    help="Use the index's compensated sets where it has them for this keep ratio, unless it was tuned to plain ones.",
)
@click.option(
    "--refresh", metavar="every:N|drift", help="Derive the set anew from the text so far, in stability and hybrid."
)
@click.option(
    "--layers", metavar="SLICE", help="Layers that become sparse, such as '4:'.  [default: those of the index, or all]"
)
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option("--system", metavar="TEXT", help="System message, with --chat.")
@click.option("--compare", is_flag=True, help="Decode densely too, and show both.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, **_D)
@click.option("--min-new-tokens", type=click.IntRange(0))
@click.option("--temperature", type=click.FloatRange(0.0, min_open=True), help="Sample; greedy without any of these.")
@click.option("--top-k", type=click.IntRange(1), help="Sample among the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), help="Nucleus sampling.")
@click.option("--min-p", type=click.FloatRange(0.0, 1.0), help="Drop tokens below this share of the likeliest.")
@click.option("--typical-p", type=click.FloatRange(0.0, 1.0, min_open=True), help="Locally typical sampling.")
@click.option("--repetition-penalty", type=click.FloatRange(0.0, min_open=True))
@click.option("--no-repeat-ngram-size", type=click.IntRange(1))
@click.option("--num-beams", type=click.IntRange(1), default=1, **_D, help="Beam search; does not stream.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop after this text; may be given several times.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, **_D, help="Of sampling and of random mode.")
@click.option(
    "--backend",
    type=click.Choice(["transformers", "llamacpp"]),
    default="transformers",
    **_D,
    help="What runs the model.",
)
@options.prefill
@options.engine
@click.option(
    "--memory-budget",
    callback=options.size,
    metavar="SIZE",
    help="Keep to this much memory, such as 2GiB: dense MLP weights stay on disk, or with --device cuda, whose memory is "
    "then counted, in host memory.  [default: no limit]",
)
@llamacpp.only_options
@options.encoder
@options.model_options
@options.as_json
@click.pass_context
def generate(
    ctx: click.Context, prompt: str | None, file: Path | None, as_json: bool, compare: bool, **given: Any
) -> None:
    """Generate from PROMPT, from the lines of --file, or from the lines of stdin.

    Prefill is dense, unless --prefill says otherwise; decode reads only the kept neurons.

    \b
    coreinfer-sim generate --index my-index --model ./my-model "How do stars form?"
    coreinfer-sim generate --index my-index --chat --compare --keep-ratio 0.6 "How do stars form?"
    coreinfer-sim generate --index my-index --backend llamacpp --exported my-ggufs "How do stars form?"
    """
    if "" in given["stop"]:
        raise click.UsageError("a --stop text is empty, which every text contains; leave it out.")
    if (given["min_new_tokens"] or 0) > given["max_new_tokens"]:
        raise click.UsageError(
            f"--min-new-tokens is {given['min_new_tokens']}, expected at most --max-new-tokens, {given['max_new_tokens']}."
        )
    if given["refresh"] and given["num_beams"] > 1:
        raise click.UsageError(
            f"--refresh follows one text, but --num-beams is {given['num_beams']}, expected 1; leave one out."
        )
    prompts = _prompts(prompt, file)
    first = next(prompts, None)
    if first is None:
        raise PromptError("no prompt was given, expected an argument, --file, or lines on stdin.")
    quiet_libraries()
    if given["backend"] == "llamacpp":
        run_one = llamacpp.runner(ctx, compare)
    else:
        llamacpp.refuse_only_options(ctx)
        _note_ineffective(ctx, given["mode"])
        with status("Loading the model; the first time this compiles the decode loops"):
            contenders = _contenders(given, compare, first)

        def run_one(text: str, shown: bool, number: int) -> list[Any]:
            runs = []
            for each in contenders:
                runs.append(_run(each, text, given, compare if shown else None, number))
                if compare and given["memory_budget"] is not None:  # there is room for the weights of one
                    each.sparse.close()
            return runs

    results = []
    n_failed = 0
    for number, text in enumerate(_chain(first, prompts)):
        try:
            runs = run_one(options.readable(text), not as_json, number)
        except PromptError as error:  # the other lines are still worth an answer
            if prompt is not None:
                raise
            click.echo(f"Error: line {number + 1}: {error}", err=True)
            n_failed += 1
            continue
        results.append([run.as_dict() for run in runs])
    if as_json:
        flat = results if compare else [runs[0] for runs in results]
        print_json(flat[0] if prompt is not None else flat)
    if n_failed:
        raise PromptError(f"{n_failed} of {n_failed + len(results)} prompts failed; the messages above say why.")


def _note_ineffective(ctx: click.Context, mode: str) -> None:
    """Say which options were given that this mode does not look at."""
    for name, modes in _EFFECTIVE.items():
        if mode not in modes and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            click.echo(f"Note: --{name.replace('_', '-')} has no effect in mode {mode}.", err=True)


def _prompts(prompt: str | None, file: Path | None) -> Iterator[str]:
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both.")
    if prompt is not None:
        yield options.readable(prompt)
    elif file is not None:
        with file.open(encoding="utf-8", errors="surrogateescape") as lines:
            yield from (line.strip() for line in lines if line.strip())
    elif not sys.stdin.isatty():
        lines = click.get_text_stream("stdin", encoding="utf-8", errors="surrogateescape")
        yield from (line.strip() for line in lines if line.strip())


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _contenders(given: dict[str, Any], compare: bool, first: str) -> list[TextGenerator]:
    """Load index and model, and return the sparse generator, after it the dense one if both are wanted."""
    from coreinfer_sim.choosing.compatibility import check_model
    from coreinfer_sim.choosing.make import make_predictor
    from coreinfer_sim.generation.text import TextGenerator
    from coreinfer_sim.index.encoder import SentenceEncoder
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import load_model, tokenizer_hash

    index = None
    if given["index"] is not None:
        encoder = SentenceEncoder(given["encoder"]) if given["encoder"] else None
        index = SemanticIndex.load(given["index"], encoder)
    if given["model"] is None and index is None:
        raise ConfigError("neither a model nor an index was given, expected --model, or --index to take it from.")
    name = given["model"] or index.manifest.model.name
    modes = [given["mode"]] + (["dense"] if compare and given["mode"] != "dense" else [])
    if given["layers"] is None:
        given["layers"] = ":" if index is None else index.recorded
    if given["prefill"] == "sparse" and given["fallback"] is None:
        given["fallback"] = "global"
    if given["memory_budget"] is None:
        language_model = load_model(name, given["dtype"], given["device"], lean=given["engine"] != "compiled")
    else:
        language_model = budgeted.load(name, given, modes, index, options.readable(first))
    if index is not None:
        check_model(index, language_model.layers, tokenizer_hash(language_model.tokenizer))
    predictors = [
        make_predictor(
            mode,
            language_model.layers,
            index,
            keep_ratio=given["keep_ratio"],
            score=given["score"],
            sparse_layers=given["layers"],
            seed=given["seed"],
            fallback=given["fallback"],
            compensated=given["compensation"],
        )
        for mode in modes
    ]
    if (
        index is not None
        and modes[0] in ("similarity", "global")
        and given["compensation"]
        and given["score"] == "energy"
    ):
        note_plain_sets(index, given["keep_ratio"])
    refreshes = [given["refresh"], None]  # not where --compare decodes densely
    return [
        TextGenerator(
            language_model,
            predictor,
            refresh,
            prefill=given["prefill"],
            engine=given["engine"],
            weights=given["weights"],
            cache_bytes=given["cluster_cache"],
        )
        for predictor, refresh in zip(predictors, refreshes, strict=False)
    ]


def _options(given: dict[str, Any], generator: TextGenerator) -> dict[str, Any]:
    """Turn the command's options into those of transformers' generate."""
    chosen = {name: given[name] for name in _SAMPLING if given[name] is not None}
    found = {"do_sample": bool(chosen), "num_beams": given["num_beams"], **chosen}
    if not chosen:  # a checkpoint's own sampling settings do not apply to greedy decoding
        found.update(temperature=None, top_k=None, top_p=None)
    for name in ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"):
        if given[name] is not None:
            found[name] = given[name]
    if given["stop"]:
        found.update(stop_strings=list(given["stop"]), tokenizer=generator.language_model.tokenizer)
    return found


def _run(generator: TextGenerator, text: str, given: dict[str, Any], compare: bool | None, number: int) -> Generation:
    """Generate one text; ``compare`` None shows nothing."""
    import torch

    torch.manual_seed(given["seed"])
    messages = options.messages(text, given["chat"], given["system"])
    if compare is not None and generator.sparse.predictor.mode == given["mode"]:
        click.echo(("\n" if number else "") + f"> {text}")
    if compare:
        click.echo(f"[{generator.sparse.predictor.mode}]")
    try:
        run = generator.generate(
            messages,
            chat=given["chat"],
            max_new_tokens=given["max_new_tokens"],
            write=None if compare is None else lambda piece: click.echo(piece, nl=False),
            **_options(given, generator),
        )
    except ValueError as error:  # transformers' own word on options that contradict each other
        raise CoreInferSimError(f"transformers refused the options ({' '.join(str(error).split())[:300]}).") from error
    if compare is not None:
        click.echo("")
        click.echo(f"  {_facts(run)}", err=not compare)
    return run


def _facts(run: Generation) -> str:
    """Say in one line where the neurons came from and what the tokens cost."""
    selection, speed = run.selection, run.tokens_per_second
    parts = [selection.mode]
    if selection.cluster is not None:
        parts.append(f"cluster {selection.cluster} ({selection.label}), similarity {selection.similarity:.3f}")
        if selection.confident is False:
            parts.append("unfamiliar prompt")
    parts += [
        f"keeps {run.keep_ratio:.2f}" + (f", {counted(run.n_refreshes, 'time')} anew" if run.n_refreshes else ""),
        counted(len(run.token_ids), "token") + ("" if speed is None else f" at {speed:.1f} tokens/s"),
        f"reads {size_text(run.mlp_bytes_per_token)} of {size_text(run.dense_mlp_bytes_per_token)} MLP weights a token",
    ]
    return " · ".join(parts)
