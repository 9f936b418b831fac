"""What every plot shares: the formats, the check before the work that it would show, and writing it in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.files import check_folder, write_atomic

_FORMATS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise ConfigError unless a plot can be written to ``path``, before the work that it would show."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"the plot is to be {path.name}, expected a name that ends in {' or '.join(_FORMATS)}.")
    check_folder(path)
    require("a plot", "matplotlib")


@contextmanager
def drawing(path: Path, width: float = 9, height: float = 6, n_axes: int = 1) -> Iterator[tuple[Any, Any]]:
    """Yield an empty matplotlib figure and its axes, and write it to ``path`` when the block ends well.

    Args:
        path: a .png or .svg file; replaced in one step.
        width: in inches.
        height: in inches.
        n_axes: side by side; more than one are yielded as an array.

    Raises:
        ConfigError: see `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # no pyplot: it would keep state and look for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure, figure.subplots(1, n_axes)
    write_atomic(path, lambda part: figure.savefig(part, format=path.suffix[1:], dpi=150))
