"""What of a corpus is fitted to, and what is held out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus, calibration_text
from coreinfer_sim.index.clustering import Clustering
from coreinfer_sim.models.loading import LanguageModel


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("prompt", "text", "max_tokens", "expected", "n_prompt"),
    [
        ("ab", "ab\ncd", 99, "ab\ncd", 2),
        ("ab", "ab", 99, "ab", 1),
        ("ab", "Q: ab A: c", 99, "Q: ab A: c", 5),
        ("abcdef", "abcdefgh", 6, "adefgh", 4),
        ("ab", "ab" + "c" * 50, 10, "ab" + "c" * 8, 2),
        ("abcdefgh", "abcdefgh" + "c" * 50, 10, "aefgh" + "c" * 5, 5),
        ("other", "abcd", 3, "abc", 1),
    ],
)
def test_where_the_prompt_ends(prompt, text, max_tokens, expected, n_prompt):
    language_model = LanguageModel(None, Letters(), "letters", [])
    found = calibration_text(language_model, Row("0", prompt, text, len(text)), max_tokens)
    assert "".join(map(chr, found.ids)) == expected and found.n_prompt == n_prompt


def test_some_texts_are_held_out_of_every_fit(tmp_path):
    assignment = np.array([0] * 40 + [1] * 7 + [2] * 900)
    clustering = Clustering(centroids=np.zeros((3, 2), np.float32), assignment=assignment, similarity=np.ones(947))
    sentences = [Row(str(i), "p", f"p{i:04d}", 5) for i in range(947)]
    language_model = SimpleNamespace(tokenizer=Letters())
    corpus = ClusteredCorpus(language_model, sentences, clustering, BuildConfig(), 100, tmp_path)
    held = corpus.held_out
    assert [int(held[assignment == cluster].sum()) for cluster in range(3)] == [5, 0, 48]
    one = replace(clustering, centroids=np.zeros((1, 2), np.float32), assignment=0 * assignment)
    assert replace(corpus, clustering=one).held_out.sum() == 48
    for cluster in (None, 0, 1, 2):
        _, texts = corpus.texts(cluster, 10**9)
        read = {int("".join(map(chr, text.ids[1:]))) for text in texts}
        assert read == set(np.flatnonzero(~held & (True if cluster is None else assignment == cluster)))
