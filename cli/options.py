"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from coreinfer_sim.base.corpus_files import check_there
from coreinfer_sim.base.errors import ConfigError, CorpusError, ModelError, PromptError
from coreinfer_sim.base.hub import out_of_reach
from coreinfer_sim.base.settings import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class IndexName(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """The name of an index, or the path of an index folder; names are completed."""

    name = "index"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so, and beside them paths."""
        from coreinfer_sim.index.names import known_indexes

        names = [CompletionItem(name) for name in known_indexes() if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="dir")]


INDEX = IndexName()
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
index = click.option(
    "--index",
    type=INDEX,
    metavar="NAME",
    help="Index by name or folder; similarity, hybrid and global need one.  [default: the only one, unless --model is given]",
)
index_that_is_needed = click.option(
    "--index", type=INDEX, metavar="NAME", help="Index by name or folder.  [default: the only one]"
)


def reachable(ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Refuse the id of a model on a hub that does not answer, before anything heavy is imported."""
    # an id without USER/ is rare, and more often a slip beside others, which are then said first
    if value is not None and "/" in value and not ctx.resilient_parsing and (why := out_of_reach(value)):
        raise ModelError(
            f"the model {value!r} cannot be loaded ({why}), expected a hub id, a checkpoint folder or a GGUF file; check the "
            "name or the connection."
        )
    return value


model = click.option(
    "--model",
    callback=reachable,
    metavar="NAME",
    help="Hub id, checkpoint folder or GGUF file.  [default: the index's model]",
)
mode = click.option(
    "--mode",
    type=click.Choice(["similarity", "hybrid", "stability", "global", "random", "all", "dense"]),
    help="Where the held neurons come from.  [default: similarity]",
)
# --help lists as many options of `generate` as it may; --read-ratio names this one.
keep_ratio = click.option(
    "--keep-ratio", type=float, hidden=True, metavar="RATIO", help="Share of neurons that are held in memory."
)
read_ratio = click.option(
    "--read-ratio",
    type=float,
    metavar="RATIO",
    help="Share of neurons that each token reads in full, on average; all are held, unless --keep-ratio holds fewer.  [default: "
    "the profile's]",
)
engine = click.option(
    "--engine",
    metavar="NAME",
    help="What decodes. lean: our loops for most model types on a CPU. transformers: the model's own code. compiled: that "
    "through torch.compile, for GPUs. llamacpp: llama.cpp on decode.exported.  [default: auto, lean if it can, else "
    "transformers]",
)
weights = click.option(
    "--weights",
    type=click.Choice(["stored", "bf16", "int8", "int4"]),
    help="Type of the weights that decode reads; all but stored need the lean engine.  [default: stored, the checkpoint's own]",
)
log = click.option(
    "--log", type=click.Path(dir_okay=False, path_type=Path), help="Keep every score here; a rerun goes on."
)
max_tokens = click.option(
    "--max-tokens",
    type=click.IntRange(4),
    help="Cut prompt and completion to half each.  [default: 1024, or the model's context]",
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


def index_of(given: str | None, model: str | None = None) -> str | None:
    """Return the index that a command uses: the one that was given, the one that is set, or the only one.

    Args:
        given: its name or folder; None: none was given.
        model: the model that was given; with one, nothing is looked up without an index of one's own choice.

    Raises:
        ConfigError: there are several.
    """
    if given is not None or model is not None:
        return given
    from coreinfer_sim.index.names import DEMO, own_indexes

    from .config import given_by_user

    found = given_by_user("index")
    if found is not None:
        return str(found[0])
    own = [name for name in own_indexes() if name != DEMO]  # a copy of the ready-made one is as much the last choice
    if len(own) > 1:
        raise ConfigError(
            f"no index was named, and there are {len(own)} ({', '.join(own)}), expected one of them; name it, or choose one for "
            f"good with 'coreinfer-sim config set index {own[0]}'."
        )
    return own[0] if own else DEMO


def needed_index(given: str | None) -> str:
    """Return the index of a command that works on one, whatever the model."""
    found = index_of(given)
    assert found is not None
    return found


def existing(_ctx: click.Context, _param: click.Parameter, value: Any) -> Any:
    """Refuse names of files that are not there; others may be on the hub."""
    for name in (value,) if isinstance(value, str) else value or ():
        try:
            check_there(name)
        except CorpusError as error:
            raise click.BadParameter(str(error)) from error
    return value


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
