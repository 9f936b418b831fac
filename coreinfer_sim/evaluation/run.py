"""Running contenders over rows, through the engines that decode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TextIO

import numpy as np

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill
from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.engines.calibration import calibrate
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.evaluation.cases import Case
from coreinfer_sim.evaluation.choosing import Chooser
from coreinfer_sim.evaluation.contenders import Contender, check_known_before
from coreinfer_sim.evaluation.formats import engine_for
from coreinfer_sim.evaluation.results import Result
from coreinfer_sim.index.compensated import Refit
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel

_MAX_TOKENS = 1024
_ALPHA = 0.4
"""Where there is no index, which has its own."""
_ROWS_AT_ONCE = 8
_REFERENCE_BYTES = 1 << 30
"""Of so many rows the dense log-probabilities are held, float32 [n_tokens, vocabulary] each: one row at least."""


def evaluate(
    language_model: LanguageModel,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    index: SemanticIndex | None = None,
    *,
    decode: DecodeConfig | None = None,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    finished: Iterable[Result] = (),
    log: TextIO | None = None,
    progress: Progress | None = None,
    histograms: Mapping[str, np.ndarray] | None = None,
    refit: Refit | None = None,
) -> list[Result]:
    """Score contenders on rows under forced sparse decode.

    Args:
        language_model: the dense model.
        contenders: what to compare.
        rows: prompts with completions; those with fewer than two completion tokens are left out.
        index: for contenders that route by meaning; checked to belong to the model.
        decode: what decodes; each contender brings its own weights. With sparse prefill, each prompt is read with the held
            neurons too, which is not for contenders that choose by the prompt's activations.
        max_tokens: prompt and completion are cut to half of this each; None: see `most_tokens`.
        max_new_tokens: also generate a text of at most this many tokens in place of each completion; None: no text.
        seed: of random choices.
        finished: results of an earlier run, which are not computed again unless they lack the text that is asked for, or
            are of another row under the same name; of several for one row and contender, the last counts.
        log: receives every result as a line of JSON, as it comes.
        progress: receives progress.
        histograms: of what tokens need, as an index that is still to be written will hold; None: those of ``index``.
        refit: of output rows, likewise.

    Raises:
        ConfigError: prompt and completion, or generated text, do not fit into the model's context, a contender knows its
            neurons only after a dense prefill, or no engine can run its weights.
    """
    # 1) what is asked for fits together
    decode, progress = decode or DecodeConfig(), progress or Progress()
    if decode.prefill is Prefill.SPARSE:
        check_known_before(contenders)
    max_tokens = most_tokens(language_model, max_tokens)
    _check_length(language_model, max_tokens, max_new_tokens)
    if index is not None:
        check_model(index, language_model.layers)
    # 2) what an earlier run has done
    known = _known(finished, rows, max_new_tokens, progress)
    results = list(known.values())
    # 3) a few rows at a time, and of them all contenders of one kind of weights
    kinds = list(dict.fromkeys(c.weights for c in contenders))
    short: set[Row] = set()
    alpha = _ALPHA if index is None else index.manifest.settings.alpha
    reads_prompts = any(contender.reads_prompt for contender in contenders)
    if histograms is None and index is not None and any(contender.read_ratio < 1 for contender in contenders):
        histograms = index.histograms
    chooser = Chooser(language_model, index, seed, refit)
    scorer = _Scorer(language_model, chooser, decode, max_tokens, alpha if reads_prompts else None, histograms)
    progress.start("Evaluating", len(rows) * len(kinds), "rows")
    n_at_once = _rows_at_once(language_model, max_tokens)
    for begin in range(0, len(rows), n_at_once):
        block = rows[begin : begin + n_at_once]
        for kind in kinds:
            own = [c for c in contenders if c.weights == kind]
            wanted = {c: [r for r in block if (str(c), r.set_name, r.id) not in known] for c in own}
            for result in scorer.results(kind, wanted, max_new_tokens, short):
                results.append(result)
                if log is not None:
                    log.write(json.dumps(asdict(result)) + "\n")
                    log.flush()
            progress.advance(len(block))
        scorer.forget_rows()
        kinds.reverse()  # the next rows begin with the kind whose weights are there
    progress.finish()
    if short:
        progress.say(f"Left out, with fewer than two completion tokens: {counted(len(short), 'row')}.")
    return results


def _known(
    finished: Iterable[Result], rows: Sequence[Row], max_new_tokens: int | None, progress: Progress
) -> dict[tuple[str, str, str], Result]:
    """Return the finished results that are of these very rows and have the text that is asked for."""
    digests = {(row.set_name, row.id): row.digest for row in rows}
    finished = list(finished)
    others = sum(digests.get((r.set_name, r.row_id), r.row_digest) != r.row_digest for r in finished)
    if others:
        progress.say(f"Not taken from the earlier run, as they are of other texts: {counted(others, 'score')}.")
    return {
        (r.contender, r.set_name, r.row_id): r
        for r in finished
        if (max_new_tokens is None or r.max_new_tokens == max_new_tokens)
        and r.row_digest == digests.get((r.set_name, r.row_id))
    }


class _Scorer:
    """Scores contenders, and holds what they share: the whole model, the rows' references, and weights of one kind.

    Several kinds of weights at once would take the memory of several models, and references of all rows gigabytes. So rows
    go in blocks whose references serve all kinds in turn, and weights are made anew for each block. That takes about as long
    as one of the passes it saves, which are one for each row.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        chooser: Chooser,
        decode: DecodeConfig,
        max_tokens: int,
        alpha: float | None,
        known: Mapping[str, np.ndarray] | None,
    ) -> None:
        self._known = known
        self._whole, self._decode, self._max_tokens, self._alpha = language_model, decode, max_tokens, alpha
        self._chooser = chooser
        self._dense: dict[str, Engine] = {}
        """What decodes 16-bit weights, by the setting of the engine."""
        self._references: dict[tuple[str, Row], Case] = {}
        self._kind = ""
        self._made: tuple[LanguageModel, Engine] | None = None
        """Weights of that kind, but 16-bit ones."""

    def results(
        self, kind: str, wanted: dict[Contender, list[Row]], max_new_tokens: int | None, short: set[Row]
    ) -> Iterator[Result]:
        """Score contenders of one kind on the rows that they want; rows without tokens to decode go to ``short``."""
        cases: dict[Row, Case] = {}
        for row in dict.fromkeys(row for group in wanted.values() for row in group):
            try:
                cases[row] = self._case(kind, row)
            except CorpusError:
                short.add(row)
        for contender, group in wanted.items():  # rows innermost: often they share a set, which is then prepared once
            for row in group:
                if row in cases:
                    yield self._score(contender, cases[row], max_new_tokens)

    def forget_rows(self) -> None:
        """Let go of the references."""
        self._references.clear()

    def _case(self, kind: str, row: Row) -> Case:
        """Return a row under weights of a kind, compared with the whole model's dense decode."""
        own = kind == "16bit"  # these are compared with the engine that decodes them
        engine = self._decode.engine if own else "auto"
        if (engine, row) not in self._references:
            if engine not in self._dense:
                _, self._dense[engine] = engine_for(self._whole, "16bit", replace(self._decode, engine=engine))
            case = Case(self._whole, self._dense[engine], row, self._max_tokens, self._alpha)
            self._references[engine, row] = case
        reference = self._references[engine, row]
        return reference if own else reference.under(*self._weights(kind))

    def _weights(self, kind: str) -> tuple[LanguageModel, Engine]:
        if self._made is None or self._kind != kind:
            self._made = None  # before the next ones are made
            self._kind, self._made = kind, engine_for(self._whole, kind, self._decode)
        return self._made

    def _score(self, contender: Contender, case: Case, max_new_tokens: int | None) -> Result:
        selection = self._chooser.choose(contender, case)
        if contender.read_ratio < 1:
            calibrate(case.engine, self._whole.tokenizer, known=self._known)
        (held,) = case.engine.prepare([selection])
        sparse = self._decode.prefill is Prefill.SPARSE
        with case.read_sparsely(held) if sparse else nullcontext():
            score = case.score(held)
        text = None if max_new_tokens is None else case.generate(selection, max_new_tokens)
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
            score.mlp_bytes,
            score.total_bytes,
            text,
            None if text is None else case.row.completion,
            max_new_tokens,
            case.row.digest,
            score.read_ratio,
        )


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


def _rows_at_once(language_model: LanguageModel, max_tokens: int) -> int:
    vocabulary = int(language_model.model.config.get_text_config().vocab_size)
    return max(1, min(_ROWS_AT_ONCE, _REFERENCE_BYTES // (4 * vocabulary * max(1, max_tokens // 2))))


def _check_length(language_model: LanguageModel, max_tokens: int, max_new_tokens: int | None) -> None:
    n_prompt, limit = -(-max_tokens // 2), language_model.context_length
    if max_new_tokens is not None and limit is not None and n_prompt + max_new_tokens > limit:
        raise ConfigError(
            f"prompts of up to {n_prompt} tokens and {max_new_tokens} new ones were asked for, but the model's context is "
            f"{limit}; lower max_tokens, of which prompts take half, or max_new_tokens."
        )
