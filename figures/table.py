"""The table of figures: what an entry is, and the options that entries share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL, DEMO_NAME = "models/smollm2-135m-instruct-q4_1.gguf", "SmolLM2-135M"
DEMO_INDEX = ROOT / "coreinfer_sim" / "index" / "demo"
REQUIRED: Any = object()
"""Stands in place of a default that there is not."""
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
SHARED: dict[str, dict[str, Any]] = {
    "model": {"metavar": "NAME", "help": "Hub id, checkpoint folder or GGUF file."},
    "name": {"help": f"Of the model, in figures and files.  [default: {DEMO_NAME}, or MODEL's own]"},
    "index": {"type": _FOLDER, "help": "Index folder of the model."},
    "data": {"type": _FOLDER, "help": "Folder of JSONL files with id, prompt and completion, a file a set."},
    "out": {"type": click.Path(path_type=Path), "help": "Folder to write."},
    "keep_ratio": {"type": click.FloatRange(0, 1, min_open=True)},
    "dtype": {"help": "Of the weights in our runtime."},
    "rows": {"type": click.IntRange(1), "help": "Of each set."},
    "max_tokens": {"type": click.IntRange(4), "help": "Of a row, half of them prompt."},
    "prompt_tokens": {"type": click.IntRange(1), "help": "Of each prompt."},
    "new_tokens": {"type": click.IntRange(2), "help": "Of each text."},
    "rounds": {"type": click.IntRange(1), "help": "Measured turns of each contender, after one to warm up."},
    "before_tree": {"type": _FOLDER, "help": "Checkout of an earlier revision to compare with."},
}
"""Options by name, each with what click is told of it; an entry names those that it uses, and its defaults."""


class Given(SimpleNamespace):
    """Values of the shared options that an entry uses."""

    model: str
    name: str
    index: Path
    data: Path
    out: Path
    keep_ratio: float
    dtype: str
    rows: int
    max_tokens: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    before_tree: Path


class Entry(click.Command):
    """A row of the table: a command that measures figures and writes them into a file."""

    def __init__(self, file: str, needs: str, takes: str, timed: bool, **more: Any) -> None:
        """Name the file under ``figures/results``, what the command needs, how long it takes, and whether it measures speed."""
        super().__init__(**more)
        self.file, self.takes, self.timed = file, takes, timed
        self.needs = "; ".join([part for part in (needs, "a quiet machine" * timed) if part])


TABLE: dict[str, Entry] = {}
"""Entries by name, such as ``speed-decode`` for the function ``decode`` in ``speed.py``."""


def figure(
    file: str, needs: str, takes: str, *, timed: bool = False, passes_options_on: bool = False, **shared: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that enters a function into the table.

    Args:
        file: that the figures are written into, under ``figures/results``.
        needs: what must be there, in words.
        takes: about how long it takes, in words.
        timed: whether speed is measured: on a quiet machine, and for each kind of processor apart.
        passes_options_on: whether options that are unknown here are arguments.
        **shared: the `SHARED` options that the function reads from `Given`, by their defaults; REQUIRED is none. Options of
            its own it declares as click's, below this decorator.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            given = Given(**{option: values.pop(option) for option in shared})
            if "name" in shared and given.name is None:
                given.name = DEMO_NAME if given.model == DEMO_MODEL else Path(given.model).name
            function(given, **values)

        name = f"{function.__module__.rpartition('.')[2]}-{function.__name__}".replace("_", "-")
        own = reversed(getattr(function, "__click_params__", []))
        TABLE[name] = Entry(
            file,
            needs,
            takes,
            timed,
            name=name,
            callback=run,
            params=[*(_option(option, default) for option, default in shared.items()), *own],
            help=function.__doc__,
            context_settings={"ignore_unknown_options": passes_options_on, "show_default": True},
        )
        return function

    return register


def _option(name: str, default: Any) -> click.Option:
    more = {"required": True} if default is REQUIRED else {"default": default}
    return click.Option([f"--{name.replace('_', '-')}"], **more, **SHARED[name])
