"""`coreinfer-sim generate --backend llamacpp`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import counted

from . import options

if TYPE_CHECKING:
    from coreinfer_sim.engines.llamacpp.generator import LlamaCppGeneration, LlamaCppGenerator

F = TypeVar("F", bound=Callable[..., Any])

_D = {"show_default": True}
_ONLY = ("exported", "memory_limit", "context")
_SHARED = {
    *("prompt", "file", "index", "mode", "fallback", "chat", "system", "compare", "max_new_tokens", "stop", "seed"),
    *("encoder", "as_json", "backend", "prefill", *_ONLY),
}
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}
"""Our options, and what llama.cpp's server calls them."""


def only_options(function: F) -> F:
    """Add the options that only llama.cpp knows."""
    for option in reversed(
        (
            click.option(
                "--exported",
                type=click.Path(exists=True, file_okay=False, path_type=Path),
                metavar="FOLDER",
                help="For llamacpp: what 'export --format gguf --manifest' wrote.",
            ),
            click.option(
                "--memory-limit",
                callback=options.size,
                metavar="SIZE",
                help="For llamacpp: models that may be open at a time, such as 2GiB.  [default: no limit]",
            ),
            click.option(
                "--context", type=click.IntRange(8), default=4096, **_D, help="For llamacpp: positions of the cache."
            ),
        )
    ):
        function = option(function)
    return function


def refuse_only_options(ctx: click.Context) -> None:
    """Raise UsageError if an option was given that only llama.cpp knows."""
    for name in _ONLY:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --backend llamacpp.")


def runner(ctx: click.Context, compare: bool) -> Callable[[str, bool, int], list[LlamaCppGeneration]]:
    """Return the function that generates for one prompt on llama.cpp, and densely as well if both are wanted."""
    from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
    from coreinfer_sim.index.encoder import SentenceEncoder
    from coreinfer_sim.index.index import SemanticIndex

    given = ctx.params
    for name in given:
        known = name in _SHARED or name in _SAMPLING
        if not known and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} does not apply to --backend llamacpp, whose models were fixed by export."
            )
    if given["index"] is None or given["exported"] is None:
        raise ConfigError(
            "llama.cpp needs an index that routes and the models exported from it; give --index and --exported."
        )
    encoder = SentenceEncoder(given["encoder"]) if given["encoder"] else None
    index = SemanticIndex.load(given["index"], encoder)
    modes = [given["mode"]] + (["dense"] if compare and given["mode"] != "dense" else [])
    settings = {name: given[name] for name in ("prefill", "fallback", "memory_limit", "context")}
    generators = [
        ctx.with_resource(LlamaCppGenerator(index, given["exported"], mode=mode, **settings)) for mode in modes
    ]

    def run(text: str, shown: bool, number: int) -> list[LlamaCppGeneration]:
        return [_run(generator, text, given, compare, shown, number) for generator in generators]

    return run


def _run(
    generator: LlamaCppGenerator, text: str, given: dict[str, Any], compare: bool, shown: bool, number: int
) -> LlamaCppGeneration:
    """Generate one text, shown as it comes if wanted."""
    sampling = {theirs: given[ours] for ours, theirs in _SAMPLING.items() if given[ours] is not None}
    if sampling:
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **sampling}
    if shown and generator.mode == given["mode"]:
        click.echo(("\n" if number else "") + f"> {text}")
    if shown and compare:
        click.echo(f"[{generator.mode}]")
    run = generator.generate(
        options.messages(text, given["chat"], given["system"]),
        chat=given["chat"],
        max_new_tokens=given["max_new_tokens"],
        write=(lambda piece: click.echo(piece, nl=False)) if shown else None,
        seed=given["seed"],
        stop=list(given["stop"]),
        **sampling,
    )
    if shown:
        click.echo("")
        click.echo(f"  {_facts(run)}", err=not compare)
    return run


def _facts(run: LlamaCppGeneration) -> str:
    """Say in one line which model answered and what it cost."""
    parts = [run.mode]
    if run.cluster is not None:
        parts.append(f"cluster {run.cluster} ({run.label}), similarity {run.similarity:.3f}")
    speed = run.tokens_per_second
    parts += [
        f"{run.model}, {run.prefill} prefill of {counted(run.n_prompt_tokens, 'token')} in {run.prefill_seconds:.2f} s",
        counted(run.n_new_tokens, "token") + ("" if speed is None else f" at {speed:.1f} tokens/s"),
    ]
    return " · ".join(parts)
