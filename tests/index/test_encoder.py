"""Sentence embeddings: unit vectors, and long texts read to their end."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from encoders import OTHERS, static, vectors_of_words

from coreinfer_sim.base.errors import IndexMismatchError, ModelError
from coreinfer_sim.index.encoder import SentenceEncoder

ROOM = 254
"""Tokens of a text that fit into all-MiniLM-L6-v2's window of 256; the words below are one token each."""
TEXTS = ["How do stars form?", "Why does bread rise?", "", "a", "Was ist ein Gebäude?", "word " * 40]


def repeated(word: str, n: int) -> str:
    return " ".join([word] * n)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_embeddings_are_unit_vectors(encoder):
    vectors = encoder.encode([*TEXTS, repeated("star", 600)])
    assert vectors.dtype == np.float32
    assert vectors.shape == (7, encoder.dimension) == (7, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_no_texts_give_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, encoder.dimension)


def test_like_texts_are_nearer_than_unlike_ones(encoder):
    star, planet, bread = encoder.encode(["How do stars form?", "How are suns born?", "How to bake bread"])
    assert star @ planet > 0.5 > star @ bread


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_batch_equals_its_texts_one_by_one(encoder, batch_size):
    texts = [*TEXTS[:3], repeated("star", 300), *TEXTS[3:], repeated("bread", 700)]
    single = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts, batch_size=batch_size), single, atol=1e-5)


def test_a_long_text_is_the_mean_of_its_windows_weighted_by_tokens(encoder):
    star, bread = encoder.encode([repeated("star", ROOM), repeated("bread", 60)]).astype(np.float64)
    assert star @ bread < 0.9
    (found,) = encoder.encode([repeated("star", ROOM) + " " + repeated("bread", 60)])
    np.testing.assert_allclose(found, unit(ROOM * star + 60 * bread), atol=1e-5)
    assert np.abs(found - unit(star + bread)).max() > 1e-2  # not the plain mean
    assert np.abs(found - star).max() > 1e-2  # not the first window alone, as truncation would have it


def test_three_windows(encoder):
    pieces = [repeated("star", ROOM), repeated("bread", ROOM), repeated("law", 10)]
    a, b, c = encoder.encode(pieces).astype(np.float64)
    (found,) = encoder.encode([" ".join(pieces)])
    np.testing.assert_allclose(found, unit(ROOM * a + ROOM * b + 10 * c), atol=1e-5)


def test_a_text_that_just_fits_is_read_in_one_pass(encoder):
    text = repeated("star", ROOM - 1) + " bread"
    direct = encoder.model.encode([text], normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(encoder.encode([text]), direct, atol=1e-6)


def test_the_end_of_a_text_counts_where_a_character_is_several_tokens(encoder):
    begin = repeated("각", 120)  # 239 characters, but 360 tokens
    one, other = encoder.encode([begin, begin + " stars"])
    assert np.abs(one - other).max() > 1e-4


def test_a_long_text_without_tokens_keeps_unit_norm_beside_others(encoder):
    vectors = encoder.encode([" " * 400, repeated("star", 400)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_probe_names_the_encoder(encoder):
    probe = encoder.probe()
    assert probe == encoder.probe() and len(probe) == 8
    encoder.check_probe(probe, "my-index")
    encoder.check_probe([value + 5e-4 for value in probe], "my-index")  # another machine's rounding


def test_another_encoder_is_an_error_that_names_both(encoder):
    probe = encoder.probe()
    with pytest.raises(IndexMismatchError, match=r"all-MiniLM-L6-v2.*my-index.*coreinfer-sim info my-index"):
        encoder.check_probe([probe[0] + 0.01, *probe[1:]], "my-index")
    with pytest.raises(IndexMismatchError):
        encoder.check_probe([-value for value in probe], "my-index")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-encoder", "/nowhere/encoder"])
def test_an_encoder_that_is_not_there_is_an_error(name):
    with pytest.raises(ModelError, match=f"the sentence encoder '{name}' cannot be loaded"):
        SentenceEncoder(name)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_encoders_without_a_window_or_a_callable_tokenizer(make, tmp_path):
    encoder = SentenceEncoder(make(tmp_path / "encoder"))
    assert encoder.dimension == 8
    texts = ["stars", "how do stars form", "bread soup", "stars " * 40 + "bread " * 20]
    vectors = encoder.encode(texts)
    assert vectors.shape == (4, 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    star, bread = vectors_of_words().numpy()[[1, 3]].astype(np.float64)
    np.testing.assert_allclose(vectors[0], unit(star), atol=1e-5)
    encoder.check_probe(encoder.probe(), "my-index")
    if encoder.window is None:  # the whole text is averaged
        np.testing.assert_allclose(vectors[3], unit(2 * star + bread), atol=1e-5)
    assert vectors[3] @ unit(bread) > vectors[0] @ unit(bread)  # the end counts


def test_a_text_without_tokens_is_nothing_to_a_static_encoder(tmp_path):
    vectors = SentenceEncoder(static(tmp_path / "encoder")).encode(["", "stars", "  "])
    assert not vectors[[0, 2]].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[1]), 1, atol=1e-5)


def test_a_static_encoder_that_is_cut_off(tmp_path):
    folder = static(tmp_path / "encoder")
    (weights,) = Path(folder).rglob("model.safetensors")
    os.truncate(weights, 40)
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceEncoder(folder)


def test_windows_by_a_tokenizer_of_the_tokenizers_package(tmp_path):
    encoder = SentenceEncoder(static(tmp_path / "encoder"))
    text = "stars " * 4 + "bread " * 3
    star, bread = (unit(vector) for vector in vectors_of_words().numpy()[[1, 3]].astype(np.float64))
    encoder.window = 6  # of which two are kept for special tokens
    np.testing.assert_allclose(encoder.encode([text])[0], unit(4 * star + 3 * bread), atol=1e-5)
