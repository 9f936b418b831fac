"""The model that is evaluated."""

from __future__ import annotations

import pytest

from coreinfer_sim.models.loading import LanguageModel, load_model


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint) -> LanguageModel:
    """The tiny Llama in float32."""
    return load_model(tiny_checkpoint, "float32")
