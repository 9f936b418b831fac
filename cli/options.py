"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from coreinfer_sim.base.errors import ConfigError, PromptError
from coreinfer_sim.base.settings import parse_size

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
device = click.option("--device", default="auto", show_default=True, help="Torch device; auto: a GPU if there is one.")
dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the model's weights; auto: as stored, bfloat16 for GGUF; float32 if the CPU lacks that.",
)
encoder = click.option(
    "--encoder", default=None, metavar="NAME", help="Sentence encoder: hub id or folder.  [default: all-MiniLM-L6-v2]"
)

log = click.option(
    "--log", type=click.Path(dir_okay=False, path_type=Path), help="Keep every score here; a rerun goes on."
)
max_tokens = click.option(
    "--max-tokens",
    type=click.IntRange(4),
    help="Cut prompt and completion to half each.  [default: 1024, or the model's context]",
)
prefill = click.option(
    "--prefill",
    type=click.Choice(["dense", "sparse"]),
    default="dense",
    show_default=True,
    help="Read prompts with the dense MLPs, or with the ones that decode, which must be known before.",
)


def _part(_ctx: click.Context, _param: click.Parameter, value: str) -> range:
    try:
        low, high = (int(number) for number in value.split(":"))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no LOW:HIGH.") from error
    if low >= high:
        raise click.BadParameter(f"{value!r} holds no part, expected LOW below HIGH.")
    if low < 0 or high > 100:
        raise click.BadParameter(f"{value!r} does not lie in 0:100.")
    return range(low, high)


def part(default: str) -> Callable[[F], F]:
    """Return --part, which picks rows by a hash of their id."""
    return click.option(
        "--part",
        default=default,
        callback=_part,
        show_default=True,
        metavar="LOW:HIGH",
        help="Rows whose id hashes into these of 100 parts; keep them apart from what the index was built on.",
    )


def model_options(function: F) -> F:
    """Add --dtype and --device."""
    return dtype(device(function))


def readable(prompt: str) -> str:
    """Return a prompt, or raise PromptError if bytes in it are no UTF-8, which Python passes on as surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(prompt[:40])
        raise PromptError(f"the prompt {shown} is not UTF-8, expected UTF-8 text; convert it first.") from error
    return prompt


def messages(prompt: str, chat: bool, system: str | None) -> Any:
    """Return what a generator takes: the prompt itself, or with a system message the beginning of a chat."""
    if system is None:
        return prompt
    if not chat:
        raise ConfigError("--system was given without --chat, which it needs.")
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Read a number of bytes."""
    return None if value is None else parse_size(value)


def template_text(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    r"""Let ``\n`` and ``\t`` in a template typed into a shell mean a newline and a tab."""
    return value if value is None else value.replace("\\n", "\n").replace("\\t", "\t")


def engine(function: F) -> F:
    """Add --engine, --weights and --cluster-cache."""
    added = (
        click.option(
            "--engine",
            type=click.Choice(["auto", "lean", "transformers", "compiled"]),
            default="auto",
            show_default=True,
            help="What decodes: our loops for Llama-like models on a CPU, or the model's own code, as it is or through "
            "torch.compile (for GPUs); auto: ours if they can.",
        ),
        click.option(
            "--weights",
            type=click.Choice(["stored", "int8"]),
            default="stored",
            show_default=True,
            help="Type in which decode reads weights; int8 needs the lean engine.",
        ),
        click.option(
            "--cluster-cache",
            callback=size,
            default="2GiB",
            show_default=True,
            metavar="SIZE",
            help="Compact weights of recent clusters to keep.",
        ),
    )
    for option in reversed(added):
        function = option(function)
    return function
