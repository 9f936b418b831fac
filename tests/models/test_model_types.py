"""All types of models of the installed transformers: those that docs/models.md calls supported are, and none is missing there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_types import TYPES, tiny_of_type, tried

from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import find_mlps

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


@pytest.mark.parametrize(("model_type", "text_part"), [("gemma3", "gemma3_text"), ("qwen2_5_vl", "qwen2_5_vl_text")])
def test_the_text_part_of_a_checkpoint_is_found_and_named(model_type, text_part, tmp_path):
    model = tiny_of_type(model_type)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), "float32", "cpu")
    assert any(
        f"is a {model_type} model, of which the part that reads text ({text_part})" in each for each in loaded.notes
    )
    assert {layer.family for layer in loaded.layers} == {text_part}
    expected = find_mlps(model)
    assert all(
        torch.equal(one.output.weight, other.output.weight) for one, other in zip(loaded.layers, expected, strict=True)
    )
