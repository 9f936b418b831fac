"""A function in a process of its own, whose failures are told."""

from __future__ import annotations

import os

import pytest

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.bench.worker import in_process


def _die():
    os._exit(3)


def _fail():
    raise ValueError("no")


def test_a_process_that_dies_is_noticed():
    with pytest.raises(GenerationError, match="died with exit code 3"):
        in_process(_die, n_threads=1)
    with pytest.raises(GenerationError, match="ValueError: no"):
        in_process(_fail, n_threads=1)
