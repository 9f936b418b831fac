"""Running contenders over rows, through the engines that decode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from typing import TextIO

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill
from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.base.rows import Row
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.evaluation.cases import Case
from coreinfer_sim.evaluation.choosing import Chooser
from coreinfer_sim.evaluation.contenders import Contender, check_known_before
from coreinfer_sim.evaluation.formats import engine_for
from coreinfer_sim.evaluation.results import Result
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel

_MAX_TOKENS = 1024
_ALPHA = 0.4
"""Where there is no index, which has its own."""
_ROWS_AT_ONCE = 4
"""Each holds its dense logits, [n_tokens, vocabulary]."""


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
    # 3) all contenders of one kind of weights, a few rows at a time
    kinds = list(dict.fromkeys(c.weights for c in contenders))
    short: set[Row] = set()
    progress.start("Evaluating", len(rows) * len(kinds), "rows")
    for kind in kinds:
        own = [c for c in contenders if c.weights == kind]
        variant = _Variant(language_model, kind, index, decode, max_tokens, seed)
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[begin : begin + _ROWS_AT_ONCE]
            wanted = {c: [r for r in block if (str(c), r.set_name, r.id) not in known] for c in own}
            for result in variant.results(wanted, max_new_tokens, short):
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


class _Variant:
    """A model with weights of one kind, made when the first row needs it, and what chooses its neurons."""

    def __init__(
        self,
        language_model: LanguageModel,
        kind: str,
        index: SemanticIndex | None,
        decode: DecodeConfig,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._whole, self._kind, self._index, self._seed = language_model, kind, index, seed
        self._decode, self._max_tokens = decode, max_tokens
        self._alpha = _ALPHA if index is None else index.manifest.settings.alpha

    @cached_property
    def _made(self) -> tuple[LanguageModel, Engine]:
        return engine_for(self._whole, self._kind, self._decode)

    @cached_property
    def _reference(self) -> tuple[LanguageModel, Engine] | None:
        """What decodes the whole model densely, which all kinds are compared with."""
        return None if self._kind == "16bit" else engine_for(self._whole, "16bit", replace(self._decode, engine="auto"))

    @cached_property
    def _chooser(self) -> Chooser:
        return Chooser(self._made[0], self._index, self._seed)

    def results(
        self, wanted: dict[Contender, list[Row]], max_new_tokens: int | None, short: set[Row]
    ) -> Iterator[Result]:
        """Score contenders on the rows that they want; rows without tokens to decode go to ``short``."""
        cases = self._cases(dict.fromkeys(row for group in wanted.values() for row in group), short)
        for contender, group in wanted.items():  # rows innermost: often they share a set, which is then prepared once
            for row in group:
                if row in cases:
                    yield self._score(contender, cases[row], max_new_tokens)

    def _cases(self, rows: Iterable[Row], short: set[Row]) -> dict[Row, Case]:
        found: dict[Row, Case] = {}
        for row in rows:
            try:
                reference = None
                if self._reference is not None:
                    reference = Case(*self._reference, row, self._max_tokens, self._alpha)
                found[row] = Case(*self._made, row, self._max_tokens, self._alpha, reference)
            except CorpusError:
                short.add(row)
        return found

    def _score(self, contender: Contender, case: Case, max_new_tokens: int | None) -> Result:
        selection = self._chooser.choose(contender, case)
        (held,) = self._made[1].prepare([selection])
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


def _check_length(language_model: LanguageModel, max_tokens: int, max_new_tokens: int | None) -> None:
    n_prompt, limit = -(-max_tokens // 2), language_model.context_length
    if max_new_tokens is not None and limit is not None and n_prompt + max_new_tokens > limit:
        raise ConfigError(
            f"prompts of up to {n_prompt} tokens and {max_new_tokens} new ones were asked for, but the model's context is "
            f"{limit}; lower max_tokens, of which prompts take half, or max_new_tokens."
        )
