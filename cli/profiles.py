"""Profiles: ``--profile``, what the user's settings prefer, and what is said of those of an index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, SelectionConfig, choice
from coreinfer_sim.base.errors import ConfigError, CoreInferSimError
from coreinfer_sim.base.settings import Profile
from coreinfer_sim.index.manifest import Manifest

from . import options
from .config import given_by_user

_EXACT = "dense decode: every token reads all weights, which loses nothing"


class ProfileName(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """The name of a profile; those of the index are completed."""

    name = "profile"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the profile."""
        try:
            return choice("profile", value, Profile)
        except ConfigError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the profiles of the index, with what they lose and gain; all names where there is none to be read."""
        try:
            manifest = _manifest(options.index_of(ctx.params.get("index"), ctx.params.get("model")))
        except CoreInferSimError:
            manifest = None
        known = [Profile.EXACT.value, *manifest.profiles] if manifest is not None else list(Profile)
        helps = {} if manifest is None else {name: info.in_words() for name, info in manifest.profiles.items()}
        return [CompletionItem(name, help=helps.get(name)) for name in known if name.startswith(incomplete)]


profile_option = click.option(
    "--profile",
    type=ProfileName(),
    metavar="NAME",
    help="What decode may lose for fewer bytes: exact, nothing; balanced, at most 3 % of perplexity; fast, at most 10 %.  "
    "[default: balanced where it gains, else exact]",
)


def chosen_profile(
    given: Profile | None, index: str | None, selection: SelectionConfig, decode: DecodeConfig
) -> Profile | None:
    """Return the profile that was asked for, or the one that the user's settings prefer where nothing speaks against it.

    Args:
        given: of the option.
        index: by name or folder; None: none is used.
        selection: as it was asked for.
        decode: what decodes.

    Raises:
        ConfigError: the user's settings name none.
    """
    source = click.get_current_context().get_parameter_source("profile")
    found = given_by_user("profile") if given is None else (given, source)
    if found is None or source is ParameterSource.COMMANDLINE:
        return given
    preferred = choice("profile", found[0], Profile)
    needs_sets = decode.prefill is Prefill.SPARSE or decode.engine == "llamacpp"
    if selection.mode_or_ratio is not None or needs_sets or (index is None and preferred is not Profile.EXACT):
        return None
    manifest = _manifest(index)
    if preferred is not Profile.EXACT and manifest is not None and preferred.value not in manifest.profiles:
        click.echo(
            f"Note: {index} has no profile {preferred.value}, which your settings prefer; 'coreinfer-sim tune' measures it.",
            err=True,
        )
        return None
    return preferred


def _manifest(index: str | None) -> Manifest | None:
    from coreinfer_sim.index.checks import read_manifest
    from coreinfer_sim.index.names import folder_of

    return None if index is None else read_manifest(folder_of(index))


def profiles_summary(manifest: Manifest) -> dict[str, Any]:
    """Return the profiles of an index as plain JSON types, by name."""
    measured = {name: {**asdict(info), "gain": info.gain} for name, info in manifest.profiles.items()}
    return {Profile.EXACT.value: {"ratio": 1.0, "gain": 0.0}, **measured}


def profile_lines(manifest: Manifest | None, current: Profile | None) -> Iterator[str]:
    """Yield a line on each profile: how it decodes, what that loses and gains; a star stands before the current one.

    Args:
        manifest: of an index; None: there is none.
        current: the profile that has the star.
    """
    for profile in Profile:
        info = None if manifest is None else manifest.profiles.get(profile.value)
        words = _EXACT if profile is Profile.EXACT else "not measured; 'coreinfer-sim tune' measures it"
        star = "*" if profile is current else " "
        yield f"  {star} {profile.value:8s}  {words if info is None else info.in_words()}"
