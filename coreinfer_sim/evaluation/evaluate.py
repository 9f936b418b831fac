"""Running contenders over rows, and what the scores add up to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.building.folder import differing
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.engines.compact import install
from coreinfer_sim.evaluation.contenders import (
    Chooser,
    Compactor,
    Contender,
    bytes_per_token,
    check_known_before,
    rounded_model,
)
from coreinfer_sim.evaluation.rows import Row
from coreinfer_sim.evaluation.scoring import Case
from coreinfer_sim.evaluation.text_scores import text_scores
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel

_N_RESAMPLES = 1000
_MAX_TOKENS = 1024
_ALPHA = 0.4
"""Where there is no index, which has its own."""
_ROWS_AT_ONCE = 4
"""Each holds its dense logits, [n_tokens, vocabulary]."""


@dataclass(frozen=True)
class Result:
    """One contender's score on one row."""

    contender: str
    set_name: str
    row_id: str
    n_tokens: int
    loss: float
    dense_loss: float
    kl: float
    n_same_top: int
    cluster: int | None
    mlp_bytes: int
    total_bytes: int
    text: str | None = None
    """Generated in place of the completion; None: nothing was generated."""
    reference: str | None = None
    """The row's completion, beside a generated text."""
    max_new_tokens: int | None = None
    """Under which the text was generated."""
    row_digest: str = ""
    """Of the texts that were scored, `Row.digest`."""


def evaluate(
    language_model: LanguageModel,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    index: SemanticIndex | None = None,
    *,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    sparse_prefill: bool = False,
    finished: Iterable[Result] = (),
    log: TextIO | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Score contenders on rows under forced sparse decode.

    Args:
        language_model: the dense model.
        contenders: what to compare.
        rows: prompts with completions; those with fewer than two completion tokens are left out.
        index: for contenders that route by meaning; checked to belong to the model.
        max_tokens: prompt and completion are cut to half of this each; None: see `most_tokens`.
        max_new_tokens: also generate a text of at most this many tokens in place of each completion; None: no text.
        seed: of random choices.
        sparse_prefill: read each prompt with the kept neurons too. Not for contenders that choose by the prompt's
            activations.
        finished: results of an earlier run, which are not computed again unless they lack the text that is asked for, or
            are of another row under the same name; of several for one row and contender, the last counts.
        log: takes every result as a line of JSON, as it comes.
        progress: takes progress.

    Raises:
        ConfigError: prompt and completion, or generated text, do not fit into the model's context, or a contender knows its
            neurons only after a dense prefill.
    """
    if sparse_prefill:
        check_known_before(contenders)
    max_tokens = most_tokens(language_model, max_tokens)
    _check_length(language_model, max_tokens, max_new_tokens)
    progress = progress or Progress()
    if index is not None:
        check_model(index, language_model.layers)
    digests = {(row.set_name, row.id): row.digest for row in rows}
    finished = list(finished)
    known = {
        (r.contender, r.set_name, r.row_id): r
        for r in finished
        if (max_new_tokens is None or r.max_new_tokens == max_new_tokens)
        and r.row_digest == digests.get((r.set_name, r.row_id))
    }
    others = sum(digests.get((r.set_name, r.row_id), r.row_digest) != r.row_digest for r in finished)
    if others:
        progress.say(f"Not taken from the earlier run, as they are of other texts: {counted(others, 'score')}.")
    results = list(known.values())
    kinds = list(dict.fromkeys(c.weights for c in contenders))
    compactor = Compactor(language_model.layers)
    short: set[Row] = set()
    progress.start("Evaluating", len(rows) * len(kinds), "rows")
    for kind in kinds:
        own = [c for c in contenders if c.weights == kind]
        variant = _Rounded(language_model, kind, index, seed)
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[begin : begin + _ROWS_AT_ONCE]
            wanted = {c: [r for r in block if (str(c), r.set_name, r.id) not in known] for c in own}
            for result in variant.results(wanted, compactor, max_tokens, max_new_tokens, sparse_prefill, short):
                results.append(result)
                if log is not None:
                    log.write(json.dumps(asdict(result)) + "\n")
                    log.flush()
            progress.advance(len(block))
        del variant  # before the next one is made
    progress.finish()
    if short:
        progress.say(f"Left out, with fewer than two completion tokens: {counted(len(short), 'row')}.")
    return results


def check_scored(results: Sequence[Result], n_rows: int) -> None:
    """Raise CorpusError if none of ``n_rows`` rows could be scored."""
    if not results:
        raise CorpusError(
            f"none of {counted(n_rows, 'row')} has two completion tokens, of which decode scores the second on; give longer "
            "completions or a larger max_tokens."
        )


class _Rounded:
    """A model with weights of one kind, rounded when the first row needs it, and what chooses its neurons."""

    def __init__(self, language_model: LanguageModel, kind: str, index: SemanticIndex | None, seed: int) -> None:
        self._whole, self._kind, self._index, self._seed = language_model, kind, index, seed
        self._alpha = _ALPHA if index is None else index.manifest.settings.alpha

    @cached_property
    def model(self) -> LanguageModel:
        return rounded_model(self._whole, self._kind)

    @cached_property
    def chooser(self) -> Chooser:
        return Chooser(self.model, self._index, self._seed)

    def results(
        self,
        wanted: dict[Contender, list[Row]],
        compactor: Compactor,
        max_tokens: int,
        max_new_tokens: int | None,
        sparse_prefill: bool,
        short: set[Row],
    ) -> Iterator[Result]:
        """Score contenders on the rows that they want; rows without tokens to decode go to ``short``."""
        cases = self._cases(dict.fromkeys(row for group in wanted.values() for row in group), max_tokens, short)
        for contender, group in wanted.items():  # rows innermost: often they share a set, which is then cut once
            for row in group:
                if row in cases:
                    yield _score(
                        self.model, self.chooser, compactor, contender, cases[row], max_new_tokens, sparse_prefill
                    )

    def _cases(self, rows: Iterable[Row], max_tokens: int, short: set[Row]) -> dict[Row, Case]:
        found: dict[Row, Case] = {}
        for row in rows:
            try:
                case = Case(self._whole, row, max_tokens, self._alpha)
            except CorpusError:
                short.add(row)
                continue
            found[row] = case if self.model is self._whole else Case(self.model, row, max_tokens, self._alpha, case)
        return found


def most_tokens(language_model: LanguageModel, max_tokens: int | None) -> int:
    """Return to how many tokens rows are cut: by default 1,024, or the model's context where that is smaller.

    Raises:
        ConfigError: more were asked for than the context holds.
    """
    limit = language_model.context_length
    if max_tokens is None:
        return _MAX_TOKENS if limit is None else min(_MAX_TOKENS, limit)
    if limit is not None and max_tokens > limit:
        raise ConfigError(f"max_tokens is {max_tokens}, but the model's context is {limit}; lower it.")
    return max_tokens


def _check_length(language_model: LanguageModel, max_tokens: int, max_new_tokens: int | None) -> None:
    n_prompt, limit = -(-max_tokens // 2), language_model.context_length
    if max_new_tokens is not None and limit is not None and n_prompt + max_new_tokens > limit:
        raise ConfigError(
            f"prompts of up to {n_prompt} tokens and {max_new_tokens} new ones were asked for, but the model's context is "
            f"{limit}; lower max_tokens, of which prompts take half, or max_new_tokens."
        )


def _score(
    language_model: LanguageModel,
    chooser: Chooser,
    compactor: Compactor,
    contender: Contender,
    case: Case,
    max_new_tokens: int | None,
    sparse_prefill: bool,
) -> Result:
    selection = chooser.choose(contender, case)
    text = None
    dense = install(language_model.layers, compactor.compact(selection, contender.weights))
    try:
        with case.read_sparsely() if sparse_prefill else nullcontext():
            score = case.score()
            if max_new_tokens is not None:
                text = case.generate(max_new_tokens)
    finally:
        install(language_model.layers, dense)
    mlp, total = bytes_per_token(language_model, selection, contender.weights)
    return Result(
        str(contender),
        case.row.set_name,
        case.row.id,
        score.n_tokens,
        score.loss,
        case.reference_loss,
        score.kl,
        score.n_same_top,
        selection.cluster,
        mlp,
        total,
        text,
        None if text is None else case.row.completion,
        max_new_tokens,
        case.row.digest,
    )


def open_log(path: Path, setup: dict[str, Any]) -> TextIO:
    """Open a log for further results; its first line says what they were made with.

    Args:
        path: of the log.
        setup: everything but contenders and rows that scores depend on, as plain JSON types.

    Raises:
        ConfigError: the log was made with something else.
    """
    found = None
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8") as file:
            try:
                found = json.loads(file.readline())["setup"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} is no log of evaluate, expected one or a new file; name another.") from error
        different = differing(found, setup)
        if different:
            raise ConfigError(
                f"{path} holds scores of other settings – {', '.join(different)} –, expected the same to go on; name "
                "another --log."
            )
    whole = found is None or _ends_a_line(path)
    file = path.open("a", encoding="utf-8")
    if not whole:
        file.write("\n")  # what a kill cut short stays a line of its own
    if found is None:
        file.write(json.dumps({"setup": setup}) + "\n")
        file.flush()
    return file


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_results(path: Path) -> list[Result]:
    """Read the log of an earlier run; a last line that a kill cut short is dropped."""
    results = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                results.append(Result(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return results


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
            "kl": round(float(np.mean([s["kl"] for s in sets.values()])), 4),
            "same_top": round(float(np.mean([s["same_top"] for s in sets.values()])), 4),
            "mlp_bytes_per_token": round(float(np.mean([r.mlp_bytes for r in own]))),
            "total_bytes_per_token": round(float(np.mean([r.total_bytes for r in own]))),
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
        "kl": round(sum(r.kl for r in group) / n, 4),
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
