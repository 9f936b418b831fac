"""What the site says of commands, settings and public names, made from the code itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import click
from coreinfer_sim_cli.config import variable_of
from coreinfer_sim_cli.main import main
from coreinfer_sim_cli.settings import GROUPS, default_text
from coreinfer_sim_cli.settings import names as names_of_settings
from sphinx.pycode import ModuleAnalyzer

import coreinfer_sim
from coreinfer_sim.base.progress import readable_size


def commands() -> str:
    """Return a section for each command: what it does, how it is called, and its options, in Markdown."""
    with click.Context(main, info_name="coreinfer-sim") as top:
        return "\n\n".join(_sections(main, top))


def _sections(command: click.Command, ctx: click.Context) -> Iterator[str]:
    if isinstance(command, click.Group):
        if ctx.parent is not None:
            yield _section(command, ctx)
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            if not child.hidden:
                with click.Context(child, info_name=name, parent=ctx) as below:
                    yield from _sections(child, below)
    else:
        yield _section(command, ctx)


def _section(command: click.Command, ctx: click.Context) -> str:
    words, *blocks = inspect.cleandoc(command.help or "").split("\n\n")
    path = ctx.command_path.removeprefix("coreinfer-sim ")
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    parts = [f"## {path}", _plain(words), f"```text\n{usage}\n```"]
    for block in blocks:
        is_as_written = block.startswith("\b")
        parts.append(f"```text\n{block.removeprefix(chr(8)).strip(chr(10))}\n```" if is_as_written else _plain(block))
    options = (param for param in command.params if isinstance(param, click.Option))
    rows = [record for option in options if (record := option.get_help_record(ctx)) is not None]
    if rows:
        parts.append("| option | |\n|---|---|\n" + "\n".join(f"| `{_cell(a)}` | {_cell(_plain(b))} |" for a, b in rows))
    return "\n\n".join(parts)


def settings() -> str:
    """Return a table for each group of settings: name, default and meaning, in Markdown."""
    parts = []
    for group, kind in GROUPS.items():
        meanings = ModuleAnalyzer.for_module(kind.__module__).find_attr_docs()
        rows = []
        for full in names_of_settings((group,)):
            name = full.partition(".")[2]
            meaning = " ".join(meanings.get((kind.__name__, name), [])).strip()
            rows.append(f"| `{full}` | `{_default(full)}` | {_cell(_plain(meaning))} |")
        about = _plain(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])
        parts.append(f"## {group}\n\n{about}\n\n| setting | default | |\n|---|---|---|\n" + "\n".join(rows))
    parts.append(f"`sample.top_k` has the variable `{variable_of('sample.top_k')}`, and the others likewise.")
    return "\n\n".join(parts)


def _default(full: str) -> str:
    """Return the default of a setting as it may be written; that of a size in binary units."""
    text = default_text(full) or "none"
    return readable_size(int(text)) if full.endswith("_bytes") and text.isdigit() else _cell(text)


def names() -> str:
    """Return what autodoc makes of the public names."""
    lines = []
    for name in coreinfer_sim.__all__:
        kind = "autoclass" if inspect.isclass(getattr(coreinfer_sim, name)) else "autofunction"
        lines.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: coreinfer_sim.{name}\n```")
    return "\n\n".join(lines)


def _plain(text: Any) -> str:
    """Return a help text as Markdown on one line: what would be markup is text, ``code`` stays code."""
    line = " ".join(str(text).replace("``", "`").split())
    return re.sub(r"([*<\[]|(?<=\w)_(?=\w)(?![^`]*`))", r"\\\1", line) if "`" not in line else line.replace("<", r"\<")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
