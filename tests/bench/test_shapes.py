"""Shapes are configurations of real architectures."""

from __future__ import annotations

import pytest

from coreinfer_sim.bench.shapes import SHAPES, parse_shape


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_configurations(name):
    shape = parse_shape(f" {name}:layers=2")
    config = shape.config()
    assert config.num_hidden_layers == 2 and config.eos_token_id is None and name in shape.title
