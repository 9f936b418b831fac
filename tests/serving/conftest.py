"""A served model that the tests of this room share."""

from __future__ import annotations

import pytest
from served import NAME, Served, backend_of

from coreinfer_sim.models.loading import load_model
from coreinfer_sim.serving.app import make_app


@pytest.fixture(scope="module")
def language_model(wide_checkpoint):
    return load_model(wide_checkpoint, "float32")


@pytest.fixture(scope="module")
def served(language_model, wide_index):
    app = make_app(backend_of(language_model, wide_index), NAME, max_new_tokens=64, body_limit=20_000)
    with Served(app) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return served.client()
