"""Replicas of the server behind Ray Serve.

Example:
    ``serve run coreinfer_sim.serving.on_ray:app index=my-index replicas=2 threads=8``
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.extra import require

KEY = "COREINFER_SIM_SERVE_API_KEY"
"""Variable with the key that requests must bring; the one that `coreinfer-sim serve` reads."""
_NUMBERS = ("replicas", "threads", "parallel")
_TEXTS = ("index", "model", "profile", "name")


def app(arguments: Mapping[str, str]) -> Any:
    """Return the application that ``serve run`` deploys.

    Args:
        arguments: ``index``, ``model``, ``profile`` and ``name`` as ``coreinfer-sim serve`` takes them; ``replicas`` (1) is how
            many processes answer; ``threads`` (1) of each, which are also the CPUs that Ray sets aside for it; ``parallel`` (4)
            is how many requests each answers at a time.

    Raises:
        ConfigError: Ray Serve is not installed, no index is named, or an argument is unknown or no number.
    """
    require("Ray Serve", "scale", "ray", "grpc", "fastapi")
    from ray import serve

    unknown = sorted(set(arguments) - {*_NUMBERS, *_TEXTS})
    if unknown:
        raise ConfigError(f"{unknown[0]} is no argument, expected one of {', '.join((*_TEXTS, *_NUMBERS))}.")
    if not arguments.get("index"):
        raise ConfigError("no index was named, expected index=NAME or the path of one, by which requests are routed.")
    numbers = {"replicas": 1, "threads": 1, "parallel": 4}
    for name in _NUMBERS:
        given = str(arguments.get(name, numbers[name]))
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"{name} is {given!r}, expected a whole number from 1.")
        numbers[name] = int(given)
    texts = {name: arguments.get(name) for name in _TEXTS}
    key, n_threads = os.environ.get(KEY), numbers["threads"]

    def make() -> Any:
        """Load the model and make the server, in a replica."""
        import torch

        from coreinfer_sim.generation.opening import load
        from coreinfer_sim.serving.app import make_app
        from coreinfer_sim.serving.backends import Backend

        torch.set_num_threads(n_threads)
        generator = load(texts["index"], texts["model"], profile=texts["profile"])
        title = texts["name"] or Path(generator.name).name
        return make_app(Backend(generator), title, api_key=key, parallel=numbers["parallel"])

    settled = serve.deployment(
        name="coreinfer_sim",
        num_replicas=numbers["replicas"],
        max_ongoing_requests=4 * numbers["parallel"],
        ray_actor_options={"num_cpus": n_threads},
    )
    return settled(serve.ingress(make)()).bind()
