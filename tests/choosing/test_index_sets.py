"""The sets that an index gives, and which of them decode where nothing is named."""

from __future__ import annotations

import pytest
from index_folder import (
    save,
)

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.index_sets import IndexSets, default_sets, wanted_sets
from coreinfer_sim.index.clusters import Match
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import (
    ProfileInfo,
)

RANKS = {  # neurons of layer 1, best first
    (0, "energy"): [0, 3, 2, 4, 1, 5],  # 2, 3 and 4 tie at 3: first the larger activation, then the lower id
    (0, "paper"): [0, 1, 4, 5, 3, 2],  # 1 and 4 tie at 2, 5 and 3 at 1: the larger activation
    (1, "energy"): [5, 1, 0, 4, 2, 3],  # 0, 2, 3 and 4 tie at 0
    (2, "energy"): [0, 1, 2, 3, 4, 5],  # everything ties, in the activation too
    (None, "energy"): [5, 1, 0, 3, 4, 2],  # sums [5, 5, 3, 3, 3, 9] and [3, 9, 1, 2, 2, 7]
    (None, "paper"): [0, 3, 1, 4, 5, 2],  # sums [300, 2, 0, 251, 2, 1]: more than a byte holds
}


@pytest.fixture
def index(tmp_path) -> SemanticIndex:
    return SemanticIndex.load(save(tmp_path / "index"))


def test_a_selection_says_where_it_came_from(index):
    selection = IndexSets(index, 0.5, layers="1").of_match(Match(1, 0.75, "label 1"))
    assert (selection.mode, selection.cluster, selection.similarity) == ("similarity", 1, 0.75)
    assert {layer: ids.tolist() for layer, ids in selection.ids.items()} == {1: sorted(RANKS[1, "energy"][:3])}


def test_sets_are_made_once(index):
    sets = IndexSets(index, 0.5)
    assert sets.of_cluster(1) is sets.of_cluster(1) and sets.of_corpus() is sets.of_corpus()
    assert sets.of_match(Match(1, 0.75, "label 1")).ids is sets.of_cluster(1).ids
    assert (sets.layers, sets.of_corpus().mode) == (index.recorded, "global")
    with pytest.raises(ConfigError, match="the cluster is 3, expected 0 to 2"):
        sets.of_cluster(3)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [(None, 0.5), (ProfileInfo(0.7, False, 0.1, 1.0, 1.0, 1.0, 1, 10), 0.7)],
    ids=["gamma", "profile"],
)
def test_the_keep_ratio_comes_from_the_profile_or_the_build(tmp_path, profile, expected):
    index = SemanticIndex.load(save(tmp_path / "index", profiles={} if profile is None else {"balanced": profile}))
    assert wanted_sets(index) == wanted_sets(index, compensated=False) == (expected, False)
    assert wanted_sets(index, 0.3) == (0.3, False)
    assert default_sets(index, Mode.HYBRID) == (expected, False)
    assert IndexSets(index).keep_ratio == expected
