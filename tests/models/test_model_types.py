"""All types of models of the installed transformers: those that docs/models.md calls supported are, and none is missing there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_types import TYPES, tried

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
SUPPORTED, LEFT_OUT = (
    set(re.findall(r"^\| ([\w.-]+) \|", part, re.MULTILINE)) - {"type"} for part in PAGE.split("\n## Left out\n")
)


@pytest.mark.parametrize("model_type", sorted(SUPPORTED & set(TYPES)))
def test_a_supported_type_decodes_compactly(model_type):
    assert tried(model_type).reason is None


def test_every_type_of_transformers_is_listed():
    unknown = set(TYPES) - SUPPORTED - LEFT_OUT
    assert not unknown, f"transformers has new types ({sorted(unknown)}): run python figures/run.py models-types"
    assert len(SUPPORTED & set(TYPES)) >= 95
