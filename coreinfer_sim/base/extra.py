"""The extra `eval`: packages that only evaluation and plots need, looked for before any work starts."""

from __future__ import annotations

from importlib.util import find_spec

from coreinfer_sim.base.errors import ConfigError


def require(purpose: str, *packages: str) -> None:
    """Raise ConfigError if one of ``packages`` is not installed; ``purpose`` is what needs them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not found here; install the extra eval: pip install '.[eval]'."
        )
