"""Scores of generated texts against one reference each, by the field's own packages."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from coreinfer_sim.base.extra import require

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_text_scores() -> None:
    """Raise ConfigError if a package that `text_scores` needs is not installed."""
    require("scoring generated texts", "eval", "rouge_score", "sacrebleu")


def text_scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Score (text, reference) pairs of one set, each score in 0 to 100.

    A reference of one line is met by the text's first line alone: the harnesses of question answering and one-sentence
    summaries stop at a newline, and a model that goes on to its next example would be scored for that.

    Returns:
        exact_match, f1: SQuAD's, after its normalisation, mean over pairs. rouge_l: F-measure, mean over pairs. bleu,
        chrf: sacrebleu's corpus scores.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    references = [reference.strip() for _, reference in pairs]
    texts = [
        text.strip() if "\n" in reference else text.strip().partition("\n")[0]
        for (text, _), reference in zip(pairs, references, strict=True)
    ]
    both = list(zip(texts, references, strict=True))
    rouge = RougeScorer(["rougeL"])
    scores = {
        "exact_match": 100 * np.mean([normalised(text) == normalised(reference) for text, reference in both]),
        "f1": 100 * np.mean([token_f1(text, reference) for text, reference in both]),
        "rouge_l": 100 * np.mean([rouge.score(reference, text)["rougeL"].fmeasure for text, reference in both]),
        # force: sacrebleu else warns of texts that end in " ." as if they had been tokenised
        "bleu": BLEU(force=True).corpus_score(texts, [references]).score,
        "chrf": CHRF().corpus_score(texts, [references]).score,
    }
    return {name: round(float(score), 2) for name, score in scores.items()}


def normalised(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without punctuation and articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(text: str, reference: str) -> float:
    """Return SQuAD's F1 over the words of a text and a reference, in 0 to 1; of two empty ones it is 1."""
    own, wanted = normalised(text).split(), normalised(reference).split()
    if not own or not wanted:
        return float(own == wanted)
    return 2 * (Counter(own) & Counter(wanted)).total() / (len(own) + len(wanted))
