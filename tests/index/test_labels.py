"""Topic labels: terms of a cluster's own, each of which adds something, and nothing but words."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer_sim.index.labels import topic_labels

TEXTS = [
    "What do stars and planets tell us?",
    "Do stars outlive planets?",
    "What do yeast and flour tell us?",
    "Does yeast eat flour?",
    "What do judges tell us about contracts?",
    "Do judges read contracts?",
]
ASSIGNMENT = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture
def labels(encoder):
    """Labels of texts, whose clusters' centroids are the means of their embeddings."""

    def of(texts, assignment, n_terms=4):
        assignment = np.asarray(assignment)
        embeddings = encoder.encode(texts)
        means = np.stack([embeddings[assignment == c].mean(0) for c in range(assignment.max() + 1)])
        centroids = means / np.linalg.norm(means, axis=1, keepdims=True)
        return topic_labels(texts, assignment, centroids, encoder.encode, n_terms)

    return of


def test_a_label_holds_the_terms_of_its_own_cluster(labels):
    stars, yeast, judges = (set(label.split(", ")) for label in labels(TEXTS, ASSIGNMENT, 2))
    assert stars == {"stars", "planets"} and yeast == {"yeast", "flour"} and judges == {"judges", "contracts"}


def test_a_label_follows_the_assignment_not_the_order(labels):
    found = labels(TEXTS, [2, 2, 0, 0, 1, 1])
    assert "yeast" in found[0] and "judges" in found[1] and "stars" in found[2]


def test_a_label_prefers_what_the_other_clusters_lack(labels):
    texts = ["tell galaxy", "tell galaxy", "tell flour", "tell flour", "tell court", "tell court"]
    for label, word in zip(labels(texts, ASSIGNMENT, 1), ("galaxy", "flour", "court"), strict=True):
        assert word in label


def test_a_text_that_repeats_itself_names_no_topic(labels):
    texts = ["comet " * 50 + "planets", *["planets and moons"] * 20, *["bread and flour"] * 20]
    assert "comet" not in labels(texts, [0] * 21 + [1] * 20, 2)[0]


def test_a_second_term_adds_to_the_first(labels):
    texts = ["contract", "contracts", "judge"] * 4 + ["star", "planet", "moon"] * 4
    first, second = labels(texts, [0] * 12 + [1] * 12, 2)[0].split(", ")
    assert {first, second} != {"contract", "contracts"}


def test_words_that_stand_together_more_than_once_are_a_term(labels):
    texts = ["Who won the world war?", "When was the world war?", "Bread rises.", "Soup boils."]
    war, food = labels(texts, [0, 0, 1, 1])
    assert "world war" in war.split(", ") and " " not in food.replace(", ", "")


def test_a_cluster_without_words_is_named_by_its_number(labels):
    assert labels(["1 2 3", "the of and"], [0, 1]) == ["cluster 0", "cluster 1"]
    assert labels(["stars", "7 + 8"], [0, 1]) == ["stars", "cluster 1"]


def test_labels_take_letters_of_any_language(labels):
    found = labels(["Öffnung der Gebäude", "открытие здания"], [0, 1])
    assert "gebäude" in found[0] and "здания" in found[1]


def test_labels_are_words_whatever_the_texts_hold(labels):
    texts = ["\x1b[31mred stars\x1b[0m, \x9b2J planets", "<script>alert(1)</script> bread", "[click](javascript:x) law"]
    for label in labels(texts, [0, 1, 2]):
        assert all(character.isalpha() or character in ", " for character in label)
