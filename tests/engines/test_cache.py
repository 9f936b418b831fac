"""Prepared weights are kept for the next prompt, up to a number of bytes."""

from __future__ import annotations

from calls import PhaseLog, RowPredictor, Snapshot, generate, selection, token_ids

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.in_transformers import TransformersEngine
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.index.ranking import n_kept
from coreinfer_sim.models.mlps import find_mlps, mlp_bytes


class NotingEngine(TransformersEngine):
    """Notes the labels of the selections that it cuts."""

    def __init__(self, model, layers, config):
        super().__init__(model, layers, config)
        self.cuts = []

    def cut(self, selection):
        self.cuts.append(selection.label)
        return super().cut(selection)


def noted(model, predictor, **settings):
    """Return a wrapper, and the list of what its engine cuts."""
    config = DecodeConfig(engine="transformers", **settings)
    engine = NotingEngine(model, find_mlps(model), config)
    return SparseModel(model, predictor, config=config, engines=[engine]), engine.cuts


def labelled(model, label):
    return NeuronSelection("test", selection(model, seed=ord(label)).ids, label=label)


def test_recent_selections_are_kept_up_to_a_number_of_bytes(models):
    model = models["llama"]
    named = {label: labelled(model, label) for label in "abcde"}
    one = mlp_bytes(find_mlps(model), named["a"].ids)
    sparse, cuts = noted(model, FixedPredictor(named["a"]), cache_bytes=4 * one)

    def use(labels):
        cuts.clear()
        for label in labels:
            sparse.predictor = FixedPredictor(named[label])
            generate(sparse, token_ids(1, 3), 2)
        return "".join(cuts)

    assert use("aaa") == "a"
    assert use("bcd") == "bcd"
    assert use("abcd") == ""
    assert use("e") == "e"  # and "a", the oldest, goes
    assert use("bcde") == ""
    assert use("a") == "a"
    assert use("dcea") == ""
    assert use("b") == "b"  # and "d", used longest ago, goes
    assert use("ceab") == ""
    assert use("d") == "d"
    sparse.close()
    assert use("b") == "b"


def test_one_selection_is_kept_however_large(models):
    model = models["llama"]
    sparse, cuts = noted(model, FixedPredictor(labelled(model, "a")), cache_bytes=1)
    for _ in range(2):
        generate(sparse, token_ids(1, 3), 2)
    assert cuts == ["a"]


def test_a_dense_prompt_cuts_nothing_twice(models):
    model = models["llama"]
    rows = RowPredictor(labelled(model, "x"), labelled(model, "y"), labelled(model, "z"))
    sparse, cuts = noted(model, rows)
    generate(sparse, token_ids(3, 4), 2)
    generate(sparse, token_ids(3, 4), 2)
    assert cuts == ["x", "y", "z"]


def test_selections_that_share_their_ids_share_a_group(models):
    """As those of prompts of one cluster do: one group, and so no grouping."""
    model = models["llama"]
    ids = selection(model).ids
    rows = RowPredictor(NeuronSelection("test", ids, label="p"), NeuronSelection("test", ids, label="q"))
    sparse, cuts = noted(model, rows)
    with PhaseLog(model) as passes:
        generate(sparse, token_ids(2, 4), 2)
    assert cuts == ["p"]
    assert passes == [(4, 48), (1, n_kept(0.4, 48))]


def test_leaving_the_block_lets_go_of_the_compact_weights(models):
    model = models["llama"]
    before = Snapshot(model)
    sparse, cuts = noted(model, FixedPredictor(labelled(model, "a")))
    with sparse:
        generate(sparse, token_ids(1, 3), 2)
    generate(sparse, token_ids(1, 3), 2)
    assert cuts == ["a", "a"]
    before.check()
