"""Scores of generated texts."""

from __future__ import annotations

import pytest

from coreinfer_sim.evaluation.text_scores import normalised, text_scores, token_f1


def test_scores_of_texts_by_hand():
    assert normalised("The  Owl's an\n“a”") == "owls “ ”"
    assert token_f1("a big dog", "the dog ran") == 0.5
    assert (token_f1("", "the"), token_f1("", "dog")) == (1.0, 0.0)
    same = "owls sleep in old trees by day\nand hunt at night"
    assert text_scores([(f" {same}\n", same)]) == dict.fromkeys(["exact_match", "f1", "rouge_l", "bleu", "chrf"], 100.0)
    cut = text_scores([("Paris!\nQuestion: And", "Paris"), ("the cat sat", "the cat ran")])
    assert (cut["exact_match"], cut["f1"]) == (50.0, 75.0)
    assert cut["rouge_l"] == pytest.approx((100 + 200 / 3) / 2, abs=0.01)
    assert 0 < cut["chrf"] < 100
    assert text_scores([("Paris\nor", "Paris\nor London")])["f1"] == 80.0  # a reference of two lines takes all
