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

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import BuildConfig, CompensationConfig, CorpusConfig, parse_size

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
}
"""By the name that users write, the settings of the library."""
_NOT_BY_NAME = {"corpus": {"source"}, "build": {"compensation"}}
"""Fields that other options fill."""
_BYTES = ("cache_bytes", "memory_budget", "memory_limit")


class Settings:
    """What ``--set`` was given, by group."""

    def __init__(self, values: dict[str, dict[str, Any]]) -> None:
        """Hold values that have been read."""
        self._values = values

    def given(self, group: str) -> list[str]:
        """Return the names that were given in a group."""
        return list(self._values.get(group, {}))

    def make(self, kind: type[T], **given: Any) -> T:
        """Return settings of a kind, from ``--set`` and from the command's own options; None: not given.

        Raises:
            UsageError: one was given both ways.
            ConfigError: a value is out of range.
        """
        group = next(name for name, each in GROUPS.items() if each is kind)
        named = {name: value for name, value in given.items() if value is not None}
        ours = self._values.get(group, {})
        twice = sorted(set(named) & set(ours))
        if twice:
            raise click.UsageError(
                f"{twice[0]} was given as an option and by --set {group}.{twice[0]}; give one of them."
            )
        return kind(**named, **ours)


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
        return Settings(found)

    return click.option(
        "--set",
        "settings",
        multiple=True,
        callback=read,
        metavar="GROUP.NAME=VALUE",
        help=f"A setting that has no option here, of {', '.join(groups)}; may be repeated. A wrong name lists them.",
    )


def names(groups: tuple[str, ...]) -> list[str]:
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
