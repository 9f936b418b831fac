"""What an export takes on disk is known before it is written."""

from __future__ import annotations

import torch
from exportable import SOURCE, exportable

from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.export.checkpoint import export_checkpoint
from coreinfer_sim.export.gguf import bits_per_value
from coreinfer_sim.export.weights import compact_weights, needed_bytes


def test_what_it_takes_on_disk(models, tmp_path):
    language_model = exportable(models["llama"])
    weights = compact_weights(language_model, NeuronSelection("t", {1: torch.arange(20)}), one_width=False)
    export_checkpoint(language_model, weights, SOURCE, tmp_path / "out")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert needed_bytes(weights, 4) <= size < needed_bytes(weights, 4) + 10_000
    assert bits_per_value("q8_0") == 8.5 and bits_per_value("q4_k_m") == 16
