"""Topic labels: a few terms that tell a cluster's prompts from those of the others, and from one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

_N_CANDIDATES = 12
"""Terms of each cluster that are embedded."""
_DIVERSITY = 0.3
"""Weight of a term's likeness to those that were chosen, beside its likeness to the cluster."""
_MOST_TERMS = 50_000
_FEWEST_OF_PAIR = 2
"""Texts of a cluster that hold a pair of words, or it is chance that they stand together."""
_WORD = re.compile(r"[^\W\d_]{3,}")
"""Letters alone, so that a label is plain text whatever the prompts hold."""


def topic_labels(
    texts: Sequence[str],
    assignment: np.ndarray,
    centroids: np.ndarray,
    encode: Callable[[Sequence[str]], np.ndarray],
    n_terms: int = 4,
) -> list[str]:
    """Label each cluster by words, or pairs of words, that are its own.

    Candidates have the largest class-based TF-IDF (Grootendorst, BERTopic, arXiv 2203.05794); maximal marginal relevance
    (Carbonell and Goldstein, 1998) chooses among them by meaning.

    Args:
        texts: of the corpus.
        assignment: cluster of each text, [n_texts].
        centroids: unit norm, [n_clusters, dim].
        encode: embeds terms as unit vectors, [n, dim].
        n_terms: most terms of a label.

    Returns:
        One label a cluster, terms joined by ", "; its number where it has no terms.
    """
    candidates = _candidates(texts, assignment, len(centroids))
    terms = sorted({term for own in candidates for term in own})
    embeddings = dict(zip(terms, encode(terms), strict=True)) if terms else {}
    labels = []
    for number, (own, centroid) in enumerate(zip(candidates, centroids, strict=True)):
        chosen = _diverse(np.array([embeddings[term] for term in own]), centroid, n_terms) if own else []
        labels.append(", ".join(own[place] for place in chosen) or f"cluster {number}")
    return labels


def _candidates(texts: Sequence[str], assignment: np.ndarray, n_clusters: int) -> list[list[str]]:
    """Return each cluster's terms of the largest class-based TF-IDF, best first.

    With f(t, c) texts of cluster c that hold term t, it is f(t, c) / Σ_t f(t, c) · log(1 + A / Σ_c f(t, c)), where A is the
    mean over clusters of Σ_t f(t, c). Texts are counted rather than occurrences, so that no single text names a topic.
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(analyzer=_terms, binary=True, max_features=_MOST_TERMS)
    try:
        held = csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # nothing but stop words and digits
        return [[] for _ in range(n_clusters)]
    members = csr_array((np.ones(len(texts)), (assignment, np.arange(len(texts)))), shape=(n_clusters, len(texts)))
    counts = csr_array(members @ held)
    everywhere = np.asarray(counts.sum(axis=0))
    rarity = np.log1p(everywhere.sum() / n_clusters / everywhere)
    terms = vectorizer.get_feature_names_out()
    fewest = np.array([_FEWEST_OF_PAIR if " " in term else 1 for term in terms])
    found = []
    for cluster in range(n_clusters):
        n_texts = counts[[cluster]].toarray()[0]
        weights = np.where(n_texts >= fewest, n_texts * rarity, 0)  # a cluster's own sum would not change their order
        order = np.argsort(-weights, kind="stable")[:_N_CANDIDATES]
        found.append([str(terms[place]) for place in order if weights[place] > 0])
    return found


def _terms(text: str) -> Iterator[str]:
    """Draw the words of a text that are no stop words, and the pairs of them that stand side by side."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = re.findall(r"\w+", text.lower())
    usable = [_WORD.fullmatch(word) is not None and word not in ENGLISH_STOP_WORDS for word in words]
    yield from (word for word, good in zip(words, usable, strict=True) if good)
    for (first, good), (second, also_good) in pairwise(zip(words, usable, strict=True)):
        if good and also_good:
            yield f"{first} {second}"


def _diverse(embeddings: np.ndarray, centroid: np.ndarray, n: int) -> list[int]:
    """Choose up to ``n`` terms, each like the cluster and unlike those before it.

    Args:
        embeddings: of the candidates, unit norm, [n_candidates, dim].
        centroid: of the cluster, unit norm, [dim].
        n: how many.

    Returns:
        Their places, in the order in which they were chosen.
    """
    relevance, likeness = embeddings @ centroid, embeddings @ embeddings.T
    chosen = [int(np.argmax(relevance))]
    while len(chosen) < min(n, len(embeddings)):
        value = (1 - _DIVERSITY) * relevance - _DIVERSITY * likeness[:, chosen].max(axis=1)
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
    return chosen
