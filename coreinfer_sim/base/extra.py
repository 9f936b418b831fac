"""Packages of an extra, which only some of the work needs, looked for before any of it starts."""

from __future__ import annotations

from importlib.util import find_spec

from coreinfer_sim.base.errors import ConfigError


def require(purpose: str, extra: str, *packages: str) -> None:
    """Raise ConfigError if one of an extra's ``packages`` is not installed; ``purpose`` is what needs them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not found here; install the extra {extra}: "
            f"pip install 'coreinfer-sim[{extra}]'."
        )
