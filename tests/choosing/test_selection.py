"""A selection is checked against the model before anything is cut."""

from __future__ import annotations

import pytest
import torch

from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.models.mlps import find_mlps


@pytest.mark.parametrize(
    ("number", "ids", "message"),
    [
        (0, [0, 48], "layer 0 .*0 to 47"),
        (1, [-1, 3], "layer 1 .*0 to 47"),
        (2, [], "layer 2 "),
        (3, [0], "names layer 3, but the model has 3 layers"),
        (-1, [0], "names layer -1"),
    ],
    ids=["too-large", "negative", "empty", "no-such-layer", "negative-layer"],
)
def test_check_refuses_ids_that_do_not_fit(models, number, ids, message):
    layers = find_mlps(models["llama"])
    selection = NeuronSelection("test", {number: torch.tensor(ids, dtype=torch.int64)})
    with pytest.raises(IndexMismatchError, match=message):
        selection.check(layers)


@pytest.mark.parametrize("ids", [[3, 3, 5], [7, 2]], ids=["twice", "descending"])
def test_check_refuses_ids_that_do_not_ascend(models, ids):
    """A neuron named twice would count twice in the output."""
    with pytest.raises(IndexMismatchError):
        NeuronSelection("test", {0: torch.tensor(ids)}).check(find_mlps(models["llama"]))


def test_check_refuses_a_mask_in_place_of_ids(models):
    mask = torch.zeros(48, dtype=torch.bool)
    mask[:20] = True
    with pytest.raises(IndexMismatchError):
        NeuronSelection("test", {0: mask}).check(find_mlps(models["llama"]))


def test_check_accepts_what_fits(models):
    layers = find_mlps(models["llama"])
    NeuronSelection("test", {0: torch.tensor([0, 47]), 2: torch.arange(48)}).check(layers)
