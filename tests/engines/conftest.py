"""A cache folder, and what is laid out in it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def same_numbers():
    """The same random numbers in each run: one in ten thousand lies so near a half that it may be rounded either way."""
    torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layouts"


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Llama of its own."""
    return save_tiny_checkpoint(tmp_path / "model")
