"""``--set group.name=value``: every setting of the library, typed and checked, for the few who need it."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from coreinfer_sim.base.analysis_settings import AnalysisConfig
from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.scale_settings import ScaleConfig
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig, CorpusConfig, parse_size

from .config import config_path, given_by_user, variable_of

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

GROUPS: dict[str, type[Any]] = {
    "select": SelectionConfig,
    "decode": DecodeConfig,
    "sample": SamplingConfig,
    "model": ModelConfig,
    "corpus": CorpusConfig,
    "build": BuildConfig,
    "compensate": CompensationConfig,
    "scale": ScaleConfig,
    "analyze": AnalysisConfig,
}
"""By the name that users write, the settings of the library."""
_NOT_BY_NAME = {"corpus": {"source"}, "build": {"compensation"}}
"""Fields that other options fill."""
_BYTES = ("cache_bytes", "prefix_bytes", "memory_budget", "memory_limit")


class Settings:
    """What ``--set`` was given, by group, and below it the user's variables and file."""

    def __init__(self, values: dict[str, dict[str, Any]], defaults: dict[str, dict[str, Any]]) -> None:
        """Hold values that have been read, and those that stand in where none was given."""
        self._values, self._defaults = values, defaults

    def given(self, group: str) -> list[str]:
        """Return the names that were given in a group on the command line."""
        return list(self._values.get(group, {}))

    def given_alone(self) -> Settings:
        """Return the settings without the user's variables and file."""
        return Settings(self._values, {})

    def make(self, kind: type[T], unless: dict[str, Any] | None = None, **given: Any) -> T:
        """Return settings of a kind, from ``--set`` and from the command's own options; None: not given.

        Args:
            kind: one of `GROUPS`.
            unless: this command's own defaults, where the user has none.
            **given: the command's options.

        Raises:
            UsageError: one was given both ways.
            ConfigError: a value is out of range.
        """
        group = next(name for name, each in GROUPS.items() if each is kind)
        named = {name: value for name, value in given.items() if value is not None}
        ours = self._values.get(group, {})
        twice = [name for name in sorted(set(named) & set(ours)) if _is_typed(name)]
        if twice:
            raise click.UsageError(
                f"{twice[0]} was given as an option and by --set {group}.{twice[0]}; give one of them."
            )
        return kind(**{**(unless or {}), **self._defaults.get(group, {}), **named, **ours})


def _is_typed(name: str) -> bool:
    """Tell whether an option was typed, rather than taken from a variable or the user's file, above which ``--set`` stands."""
    context = click.get_current_context(silent=True)
    return context is None or context.get_parameter_source(name) is ParameterSource.COMMANDLINE


class SetOption(click.Option):
    """``--set``, which knows its groups."""

    def __init__(self, *names: Any, groups: tuple[str, ...], **attributes: Any) -> None:
        """Take what `click.Option` takes, and the groups."""
        super().__init__(*names, **attributes)
        self.groups = groups

    def named(self, option: str) -> str | None:
        """Return the setting that an option would be called like, such as ``scale.executor`` for ``--executor``."""
        name = option.lstrip("-").replace("-", "_")
        return next((full for full in names(self.groups) if full.partition(".")[2] == name), None)


def set_option(*groups: str) -> Callable[[F], F]:
    """Add --set for some groups."""

    def read(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> Settings:
        found: dict[str, dict[str, Any]] = {}
        for text in values:
            group, name, value = _parsed(text, groups)
            own = found.setdefault(group, {})
            if name in own:
                raise click.BadParameter(f"{group}.{name} was given twice; leave one out.")
            own[name] = value
        return Settings(found, _of_user(groups))

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(f"{name}=") for name in names(groups) if name.startswith(incomplete)]

    return click.option(
        "--set",
        "settings",
        cls=SetOption,
        groups=groups,
        multiple=True,
        callback=read,
        shell_complete=complete,
        metavar="GROUP.NAME=VALUE",
        help=f"A setting that has no option here, of {', '.join(groups)}; may be repeated. 'config show' lists them.",
    )


def _of_user(groups: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what the user's variables and file say of some groups."""
    found: dict[str, dict[str, Any]] = {}
    for full in names(groups):
        given = given_by_user(full)
        if given is None:
            continue
        try:
            group, name, value = _parsed(f"{full}={_as_text(given[0])}", groups)
        except click.BadParameter as error:
            where = f"the variable {variable_of(full)}" if given[1] == "variable" else config_path()
            raise ConfigError(f"{where}: {error.message}") from error
        found.setdefault(group, {})[name] = value
    return found


def _as_text(value: Any) -> str:
    """Write a value as ``--set`` reads it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    return ",".join(map(_as_text, value)) if isinstance(value, list | tuple) else str(value)


def check_setting(full: str, text: str) -> Any:
    """Return what the user's file holds for a setting of the library, or raise BadParameter if it cannot have that value."""
    group, name, value = _parsed(f"{full}={text}", tuple(GROUPS))
    try:
        GROUPS[group](**{"source": "any"} if group == "corpus" else {}, **{name: value})
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error
    return value if isinstance(value, bool | int | float) else text


def default_text(full: str) -> str:
    """Return the built-in default of a setting of the library, as ``--set`` reads it."""
    group, _, name = full.partition(".")
    return _as_text(next(field.default for field in dataclasses.fields(GROUPS[group]) if field.name == name))


def names(groups: tuple[str, ...] = tuple(GROUPS)) -> list[str]:
    """Return every name that --set knows, such as ``sample.top_k``."""
    return [
        f"{group}.{field.name}"
        for group in groups
        for field in dataclasses.fields(GROUPS[group])
        if field.name not in _NOT_BY_NAME.get(group, set())
    ]


def _parsed(text: str, groups: tuple[str, ...]) -> tuple[str, str, Any]:
    full, equals, value = text.partition("=")
    full = full.strip()
    if not equals:
        raise click.BadParameter(f"{text!r} has no value, expected GROUP.NAME=VALUE such as sample.top_k=40.")
    known = names(groups)
    if full not in known:
        if full in names(tuple(GROUPS)):
            raise click.BadParameter(f"{full} is of another command; this one knows the groups {', '.join(groups)}.")
        leaf = full.rpartition(".")[2]
        near = difflib.get_close_matches(full, known, 3, 0.5) or [n for n in known if n.rpartition(".")[2] == leaf]
        listed = f"nearest: {', '.join(near)}" if near else f"known groups are {', '.join(groups)}"
        raise click.BadParameter(f"there is no setting {full!r}; {listed}.")
    group, _, name = full.partition(".")
    hint = typing.get_type_hints(GROUPS[group])[name]
    try:
        return group, name, _converted(name, value.strip(), hint)
    except (ValueError, ConfigError) as error:
        raise click.BadParameter(f"{full} is {value!r}, expected {_said(name, hint)}.") from error


def _converted(name: str, value: str, hint: Any) -> Any:
    """Turn text into a value of a field's type; raise ValueError where it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _first(name, value, typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        (each, *_) = typing.get_args(hint)
        return tuple(_converted(name, part.strip(), each) for part in value.split(","))
    if hint is bool:
        known = {"true": True, "yes": True, "false": False, "no": False}
        if value.lower() not in known:
            raise ValueError(value)
        return known[value.lower()]
    if hint is int and name in _BYTES:
        return 0 if value == "0" else parse_size(value)
    return hint(value)


def _first(name: str, value: str, hints: tuple[Any, ...]) -> Any:
    """Read text as the first of several types that it fits; "none" is a choice of that name before it is None."""
    choices = [hint for hint in hints if hint is not type(None)]
    if len(choices) < len(hints) and value.lower() == "none" and not any(_is_choice("none", hint) for hint in choices):
        return None
    for hint in choices:
        try:
            return _converted(name, value, hint)
        except ValueError:
            continue
    raise ValueError(value)


def _is_choice(value: str, hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum) and value in [each.value for each in hint]


def _said(name: str, hint: Any) -> str:
    """Say in words what a type holds."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [each for each in typing.get_args(hint) if each is not type(None)]
        may_be_none = len(choices) < len(typing.get_args(hint)) and not any(
            _is_choice("none", each) for each in choices
        )
        return " or ".join([*(_said(name, each) for each in choices), *(["none"] if may_be_none else [])])
    if typing.get_origin(hint) is tuple:
        return f"{_said(name, typing.get_args(hint)[0])}, several parted by commas"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(each.value) for each in hint)
    if hint is int and name in _BYTES:
        return "a size such as 2GiB"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint))
