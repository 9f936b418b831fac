"""A sound index for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from index_folder import (
    save,
)

from coreinfer_sim.index.index import SemanticIndex


@pytest.fixture
def index_folder(tmp_path) -> Path:
    """A sound index."""
    return save(tmp_path / "index")


@pytest.fixture
def index(index_folder) -> SemanticIndex:
    return SemanticIndex.load(index_folder)
