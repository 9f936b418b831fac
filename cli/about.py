"""What `coreinfer-sim --version` prints."""

from __future__ import annotations

import click

_PACKAGES = ("torch", "transformers", "sentence-transformers", "numba", "faiss-cpu", "numpy", "xllamacpp")


def print_version(details: bool) -> None:
    """Print the version; ``details``: also what it stands on, where it runs and where it keeps things."""
    from importlib.metadata import version  # here, as every command would wait for it

    click.echo(f"coreinfer-sim, version {version('coreinfer-sim')}")
    if not details:
        return
    import platform

    from coreinfer_sim.base.files import cache_folder
    from coreinfer_sim.base.processes import n_cores
    from coreinfer_sim.base.processor import processor, processor_features
    from coreinfer_sim.index.names import indexes_folder
    from coreinfer_sim.index.places import model_folders

    from .config import config_path

    facts = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: _installed(package) for package in _PACKAGES},
        "processor": f"{processor()}, {n_cores()} cores",
        "features": " ".join(processor_features()) or "none that decode could use",
        "indexes": str(indexes_folder()),
        "models": ", ".join(map(str, model_folders())),
        "cache": str(cache_folder("")),
        "settings": str(config_path()),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"  {name:{width}s}  {value}")


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
