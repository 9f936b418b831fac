"""The user's file of settings and the variables that stand above it, and `coreinfer-sim config`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import platformdirs
from click.shell_completion import CompletionItem

from coreinfer_sim.base.decode_settings import choice
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Profile

from . import options
from .console import print_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNGROUPED = ("index", "profile")
"""The settings that have no group: the index of commands that are given none, and the profile that is preferred."""


def config_path() -> Path:
    """Return where the user's settings are kept."""
    return platformdirs.user_config_path("coreinfer_sim", appauthor=False) / "config.toml"


def variable_of(name: str) -> str:
    """Return the environment variable of a setting: ``COREINFER_SIM_SERVE_PORT`` for ``serve.port``."""
    return "COREINFER_SIM_" + name.upper().replace(".", "_").replace("-", "_")


def stored() -> dict[str, Any]:
    """Return what the user's file holds by full name, such as ``serve.port``; nothing where there is no file.

    Raises:
        ConfigError: it is no TOML.
    """
    try:
        content = tomllib.loads(config_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config_path()} is no TOML ({error}), expected settings; correct or remove it.") from error
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return found


def given_by_user(name: str) -> tuple[Any, str] | None:
    """Return a setting's value and whether the variable or the file gives it; None: neither does."""
    if value := os.environ.get(variable_of(name)):
        return value, "variable"
    found = {_plain(each): value for each, value in stored().items()}
    return (found[_plain(name)], "file") if _plain(name) in found else None


def default_map(commands: click.Group) -> dict[str, dict[str, Any]]:
    """Return what the file says of commands' options, as click takes it.

    Raises:
        ConfigError: the file names a setting that there is not.
    """
    from .settings import names

    found: dict[str, dict[str, Any]] = {}
    known = {_plain(name): option for name, option in _options(commands)}
    library = {_plain(name) for name in (*UNGROUPED, *names())}
    for name, value in stored().items():
        option = known.get(_plain(name))
        if option is not None and option.name is not None:
            found.setdefault(name.partition(".")[0], {})[option.name] = value
        elif _plain(name) not in library:
            raise ConfigError(
                f"{config_path()} holds {name}, which is no setting; {_nearest(name, commands)}; 'coreinfer-sim config unset "
                f"{name}' removes it."
            )
    return found


def name_variables(commands: click.Group) -> None:
    """Give every option of every command its environment variable."""
    for name, option in _options(commands):
        option.envvar = [variable_of(name), *([option.envvar] if isinstance(option.envvar, str) else [])]


def _options(commands: click.Group) -> Iterator[tuple[str, click.Option]]:
    """Yield the options of all commands, by names such as ``serve.port``."""
    for command in commands.commands.values():
        for param in command.params if not command.hidden else []:
            if isinstance(param, click.Option) and param.name != "settings":
                yield f"{command.name}.{max(param.opts, key=len).lstrip('-')}", param


def _all_names(commands: click.Group) -> list[str]:
    from .settings import names

    return [*UNGROUPED, *names(), *(name for name, _ in _options(commands))]


def _plain(name: str) -> str:
    """Return a name by which those with hyphens and with underscores are the same."""
    return name.replace("_", "-")


def _nearest(name: str, commands: click.Group) -> str:
    known = _all_names(commands)
    near = difflib.get_close_matches(name, known, 3, 0.5) or [each for each in known if each.endswith(f".{name}")][:3]
    return f"nearest: {', '.join(near)}" if near else "'coreinfer-sim config show' lists them"


def _checked(name: str, value: str, ctx: click.Context) -> tuple[str, Any]:
    """Return a setting's full name and its value as the file holds it, or raise BadParameter."""
    from .settings import check_setting, names

    commands = ctx.find_root().command
    assert isinstance(commands, click.Group)
    for known in (*UNGROUPED, *names()):
        if _plain(known) == _plain(name):
            return known, value if known in UNGROUPED else check_setting(known, value)
    for known, option in _options(commands):
        if _plain(known) == _plain(name):
            parts = [part.strip() for part in value.split(",")] if option.multiple else value
            read = option.process_value(ctx, parts)
            return known, read if isinstance(read, bool | int | float) and not option.callback else parts
    raise click.BadParameter(f"there is no setting {name!r}; {_nearest(name, commands)}.")


def _complete_name(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    commands = ctx.find_root().command
    assert isinstance(commands, click.Group)
    return [CompletionItem(name) for name in _all_names(commands) if name.startswith(incomplete)]


def _write(settings: dict[str, Any]) -> None:
    import tomli_w

    from coreinfer_sim.base.files import write_atomic

    nested: dict[str, Any] = {name: value for name, value in settings.items() if "." not in name}
    for name, value in settings.items():
        group, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(group, {})[inner] = value
    config_path().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(config_path(), lambda part: part.write_text(tomli_w.dumps(nested), encoding="utf-8"))


@click.group()
def config() -> None:
    """Show and change the defaults of options and settings.

    NAME is index, profile, COMMAND.OPTION such as serve.port, or GROUP.NAME such as sample.top_k. An option on the command line
    comes first, then the variable, then the file, then the built-in default. The variable of serve.port is
    COREINFER_SIM_SERVE_PORT.
    """


@config.command()
@options.as_json
def show(as_json: bool) -> None:
    """List all settings with their values, and the options that have a value of yours."""
    from .settings import default_text, names

    rows = []
    commands = click.get_current_context().find_root().command
    assert isinstance(commands, click.Group)
    library = [*UNGROUPED, *names()]
    for name in [*library, *(name for name, _ in _options(commands))]:
        found = given_by_user(name)
        if found is not None or name in library:
            value, source = found or (None if name in UNGROUPED else default_text(name), "default")
            rows.append({"name": name, "value": value, "from": source})
    if as_json:
        print_json({"path": str(config_path()), "settings": rows})
        return
    click.echo(f"# {config_path()}" + ("" if config_path().exists() else " (not there yet)"))
    for row in rows:
        source = "" if row["from"] == "default" else f"  # {row['from']}"
        click.echo(f"{row['name']} = {'none' if row['value'] is None else row['value']}{source}")


@config.command("set")
@click.argument("name", shell_complete=_complete_name)
@click.argument("value")
@click.pass_context
def set_(ctx: click.Context, name: str, value: str) -> None:
    """Set NAME to VALUE in the file; several values are parted by commas."""
    full, checked = _checked(name, value, ctx)
    if full == "index":
        from coreinfer_sim.index.names import folder_of

        folder_of(value)
    if full == "profile":
        choice(full, value, Profile)
    _write({**{each: kept for each, kept in stored().items() if _plain(each) != _plain(full)}, full: checked})
    click.echo(f"{full} = {checked}")


@config.command()
@click.argument("name", shell_complete=_complete_name)
def unset(name: str) -> None:
    """Take NAME out of the file."""
    settings = stored()
    left = {each: value for each, value in settings.items() if _plain(each) != _plain(name)}
    if left == settings:
        raise ConfigError(
            f"{name} is not set in {config_path()}, which holds {', '.join(settings) or 'nothing'}; 'coreinfer-sim config show' "
            "lists what is set."
        )
    _write(left)


@config.command()
def path() -> None:
    """Print where the file is."""
    click.echo(str(config_path()))
