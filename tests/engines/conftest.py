"""A cache folder, and what is laid out in it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.router import DENSE
from coreinfer_sim.export.gguf import export_gguf
from coreinfer_sim.export.weights import Source, compact_weights
from coreinfer_sim.models.loading import load_model


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


@pytest.fixture
def quantised_file(tmp_path):
    """Writes a tiny Llama as a GGUF file of a type."""

    def written(kind):
        loaded = load_model(save_tiny_checkpoint(tmp_path / "source", hidden_size=64, intermediate_size=96))
        weights = compact_weights(loaded, NeuronSelection(DENSE), one_width=False)
        source = Source("model", "none", "none", DENSE, 1.0, False, kind)
        export_gguf(loaded, weights, source, tmp_path / "model.gguf", kind)
        return tmp_path / "model.gguf"

    return written
