"""What scores add up to, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coreinfer_sim.evaluation.results import Result
from coreinfer_sim.evaluation.text_scores import text_scores

_N_RESAMPLES = 1000


def summarise(results: Sequence[Result], seed: int = 0, *, generated: bool = False) -> list[dict[str, Any]]:
    """Add results up by contender.

    Args:
        results: of `evaluate`.
        seed: of the bootstrap.
        generated: also score the generated texts, which every result then holds; needs the extra `eval`.

    Returns:
        For each contender: perplexity, its ratio to dense, KL and top-1 agreement per set; the geometric mean of the
        ratios over sets with a 95 % bootstrap interval (rows resampled within sets; None where a set has one row, which tells
        nothing of how rows differ); bytes per token, mean over rows;
        under "text" the scores of `text_scores`, per set and their mean over sets.
    """
    summary = []
    for name in dict.fromkeys(result.contender for result in results):
        own = [result for result in results if result.contender == name]
        by_set: dict[str, list[Result]] = {}
        for result in own:
            by_set.setdefault(result.set_name, []).append(result)
        sets = {set_name: _set_summary(group) for set_name, group in sorted(by_set.items())}
        interval = _interval(list(by_set.values()), seed)
        row: dict[str, Any] = {
            "contender": name,
            "ratio": round(_geometric_mean([s["ratio"] for s in sets.values()]), 4),
            "ratio_interval": None if interval is None else [round(bound, 4) for bound in interval],
            "kl": round(float(np.mean([s["kl"] for s in sets.values()])), 6),
            "same_top": round(float(np.mean([s["same_top"] for s in sets.values()])), 4),
            "mlp_bytes_per_token": round(float(np.mean([r.mlp_bytes for r in own]))),
            "total_bytes_per_token": round(float(np.mean([r.total_bytes for r in own]))),
            "read_ratio": round(float(np.mean([r.read_ratio for r in own])), 4),
            "n_rows": len(own),
        }
        if generated:
            for set_name, group in by_set.items():
                sets[set_name]["text"] = text_scores([(r.text or "", r.reference or "") for r in group])
            of_sets = [s["text"] for s in sets.values()]
            row["text"] = {metric: round(float(np.mean([s[metric] for s in of_sets])), 2) for metric in of_sets[0]}
        summary.append({**row, "sets": sets})
    return summary


def _set_summary(group: Sequence[Result]) -> dict[str, Any]:
    n = sum(r.n_tokens for r in group)
    loss, dense = sum(r.loss for r in group) / n, sum(r.dense_loss for r in group) / n
    return {
        "perplexity": round(math.exp(loss), 3),
        "dense_perplexity": round(math.exp(dense), 3),
        "ratio": round(math.exp(loss - dense), 4),
        "kl": round(sum(r.kl for r in group) / n, 6),
        "same_top": round(sum(r.n_same_top for r in group) / n, 4),
        "n_rows": len(group),
    }


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


def _interval(groups: Sequence[Sequence[Result]], seed: int) -> tuple[float, float] | None:
    """Bootstrap the geometric mean over sets of the perplexity ratio.

    Of n rows a bootstrap draws a variance that is (n − 1) / n of the unbiased one (Efron and Tibshirani, 1993), half of it for
    two, so each set's draws are spread by the root of the inverse.
    """
    if any(len(group) == 1 for group in groups):
        return None
    rng = np.random.default_rng(seed)
    logs = np.zeros(_N_RESAMPLES)
    for group in groups:
        gap = np.array([r.loss - r.dense_loss for r in group])
        tokens = np.array([r.n_tokens for r in group], dtype=float)
        drawn = rng.integers(len(group), size=(_N_RESAMPLES, len(group)))
        mean, n = gap.sum() / tokens.sum(), len(group)
        logs += (mean + (gap[drawn].sum(1) / tokens[drawn].sum(1) - mean) * math.sqrt(n / (n - 1))) / len(groups)
    return float(np.exp(np.quantile(logs, 0.025))), float(np.exp(np.quantile(logs, 0.975)))
