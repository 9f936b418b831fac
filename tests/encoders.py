"""Sentence encoders that are no transformers: small ones, made by sentence-transformers' own parts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = ("[UNK]", "stars", "planets", "bread", "soup", "the", "how", "do", "form")


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def vectors_of_words(dimension: int = 8) -> torch.Tensor:
    return torch.randn(len(VOCABULARY), dimension, generator=torch.Generator().manual_seed(0))


def static(folder: Path) -> str:
    """Token vectors that are averaged: no window, and a tokenizer of the tokenizers package."""
    SentenceTransformer(modules=[StaticEmbedding(word_tokenizer(), embedding_weights=vectors_of_words())]).save(
        str(folder)
    )
    return str(folder)


def model2vec(folder: Path) -> str:
    """As model2vec saves a model, without a word of sentence-transformers."""
    folder.mkdir()
    save_file({"embeddings": vectors_of_words()}, folder / "model.safetensors")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "hidden_dim": 8, "normalize": True}))
    return str(folder)


def words(folder: Path, window: int | None) -> str:
    """Word vectors, read by a tokenizer that is no function."""
    tokenizer = WhitespaceTokenizer(VOCABULARY, stop_words=[], do_lower_case=True)
    table = WordEmbeddings(tokenizer, vectors_of_words(), max_seq_length=window)
    SentenceTransformer(modules=[table, Pooling(8)]).save(str(folder))
    return str(folder)


OTHERS = {
    "static": static,
    "model2vec": model2vec,
    "words, without a window": lambda folder: words(folder, None),
    "words, of a window": lambda folder: words(folder, 6),
}
