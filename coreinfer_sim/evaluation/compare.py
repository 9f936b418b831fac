"""Files and names to a table: what `evaluate` scores, on which rows, and what that adds up to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coreinfer_sim.base.corpus_files import check_there
from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, Prefill
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import Progress, shown
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import CorpusConfig, Fallback, Profile, Weights
from coreinfer_sim.choosing.promised import measured
from coreinfer_sim.engines.registry import check_engine
from coreinfer_sim.evaluation.contenders import (
    FITTED,
    NAMES,
    NEED_INDEX,
    READS_PROMPT,
    Contender,
    check_known_before,
    is_file_name,
    parse_contenders,
)
from coreinfer_sim.evaluation.results import Result, check_scored, open_log, read_results
from coreinfer_sim.evaluation.rows import read_sets
from coreinfer_sim.evaluation.run import evaluate as score
from coreinfer_sim.evaluation.run import most_tokens
from coreinfer_sim.evaluation.summary import summarise
from coreinfer_sim.evaluation.text_scores import check_text_scores
from coreinfer_sim.generation.opening import model_name, open_index, open_model
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.fingerprint import weights_checksum
from coreinfer_sim.models.loading import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` has found."""

    model: str
    contenders: list[Contender]
    summary: list[dict[str, Any]]
    """A row a contender, of plain JSON types; see `summarise`."""


def evaluate(
    sets: str | Path | Sequence[str | Path],
    index: str | Path | SemanticIndex | None = None,
    model: str | LanguageModel | None = None,
    *,
    contenders: Sequence[str] = (),
    keep_ratios: Sequence[float] = (),
    read_ratios: Sequence[float] = (),
    scores: Sequence[str] = (),
    weights: Sequence[str] = (),
    fallbacks: Sequence[str] = ("none",),
    part: range = range(100),
    limit: int | None = 40,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    log: Path | None = None,
    corpus: CorpusConfig | None = None,
    decode: DecodeConfig | None = None,
    loading: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score ways of choosing neurons on prompts with completions, beside dense decode.

    Example:
        >>> found = coreinfer_sim.evaluate("held-out.jsonl", "my-index", contenders=["dense", "balanced", "fast"])
        >>> [(row["contender"], row["ratio"], row["total_bytes_per_token"]) for row in found.summary]

    Args:
        sets: files or data sets with prompts and completions, or conversations.
        index: name or folder of an index, or a loaded one; None: only contenders that need none.
        model: hub id, checkpoint folder, GGUF file or a loaded model; None: the index's.
        contenders: ``dense``, the other names of `contenders.NAMES`, ``balanced`` and ``fast`` as they were measured for the
            index, or ways as a table names them; none: all that are worth comparing.
        keep_ratios: of held sets; none: those that the index compensates, else 0.4.
        read_ratios: share of neurons that a token reads; none: 1.
        scores: what ranks a cluster's neurons: energy, paper or compensated.
        weights: types of weights, or GGUF files of the same model; none: 16bit, and dense in int8 and q4_0.
        fallbacks: what similarity does for unfamiliar prompts.
        part: of the 100 parts into which ids hash, those whose rows are taken.
        limit: rows of each set; None: all.
        max_tokens: prompt and completion are cut to half of this each; None: see `most_tokens`.
        max_new_tokens: also generate texts of at most so many tokens, and compare them with the completions; None: no text.
        seed: of random choices and of the bootstrap.
        log: keeps every score; a later call goes on from it.
        corpus: how the sets are read; its own source is not looked at.
        decode: what decodes.
        loading: type and device of the model, and the sentence encoder.
        progress: receives messages and progress; None: see `shown`.

    Raises:
        CoreInferSimError: what is missing, damaged or does not belong together.
    """
    # 1) what would fail at the end is looked at first
    decode, loading, progress = decode or DecodeConfig(), loading or ModelConfig(), shown(progress)
    sources = [sets] if isinstance(sets, str | Path) else list(sets)
    for source in sources:
        check_there(str(source))
    if max_new_tokens is not None:
        check_text_scores()
    rows = read_sets(sources, part, limit, corpus, progress)
    opened = open_index(index, loading.encoder)
    name = model.name if isinstance(model, LanguageModel) else model_name(opened, model)
    # 2) who is compared
    wanted = _Wanted(contenders, keep_ratios, read_ratios, scores, weights, fallbacks)
    chosen = wanted.chosen(opened, name, decode)
    loaded = model if isinstance(model, LanguageModel) else open_model(opened, name, loading, decode, progress)
    if not contenders and not weights:
        chosen = _able(loaded, chosen, decode, progress)
    # 3) scores, and what they add up to
    results = score_with_log(
        loaded,
        chosen,
        rows,
        opened,
        decode,
        seed=seed,
        max_tokens=max_tokens,
        log=log,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    check_scored(results, len(rows))
    return Evaluation(name, chosen, summarise(results, seed, generated=max_new_tokens is not None))


@dataclass(frozen=True)
class _Wanted:
    """Contenders by name, and what they are crossed with; see `evaluate`."""

    names: Sequence[str]
    keep_ratios: Sequence[float]
    read_ratios: Sequence[float]
    scores: Sequence[str]
    weights: Sequence[str]
    fallbacks: Sequence[str]

    def chosen(self, index: SemanticIndex | None, model: str, decode: DecodeConfig) -> list[Contender]:
        """Return the contenders that were named, or those that are worth comparing."""
        sparse_prefill = decode.prefill is Prefill.SPARSE
        excluded = (*(NEED_INDEX if index is None else ()), *(READS_PROMPT if sparse_prefill else ()))
        if not self.read_ratios:
            excluded = (*excluded, "all")  # which is then dense
        profiles = [name for name in self.names if name in {*Profile}]
        names = [name for name in self.names or NAMES if name not in profiles and (self.names or name not in excluded)]
        fitted = [] if index is None else [info.keep_ratio for info in index.manifest.compensation]
        ratios, kinds = self.keep_ratios or fitted or [0.4], self.weights or ["16bit"]
        found = parse_contenders(names, ratios, self.scores or ["energy"], kinds, self.fallbacks, self.read_ratios)
        found += [contender_of(Profile(name), index, model) for name in profiles]
        if index is not None and not self.names and not self.scores:
            there = [ratio for ratio in ratios if index.manifest.holds_sets(ratio)]
            found += parse_contenders([name for name in FITTED if there], there, ["compensated"], kinds, self.fallbacks)
        if not self.names and not self.weights:  # what one would take instead of any of them
            found += parse_contenders(["dense"], [1.0], ["energy"], ["int8", "q4_0"])
        if sparse_prefill:
            check_known_before(found)
        return list(dict.fromkeys(found))


def contender_of(profile: Profile, index: SemanticIndex | None, model: str) -> Contender:
    """Return what a profile decodes by as a contender.

    Args:
        profile: exact, or one that was measured for the index.
        index: with its profiles.
        model: its name, which tells whether the stored weights are a GGUF file's codes.

    Raises:
        ConfigError: there is no index, or nothing was measured for it.
    """
    stored = "stored" if is_file_name(model) else "16bit"
    if profile is Profile.EXACT:
        return Contender("dense", weights=stored)
    info = measured(index, profile)
    kind = stored if info.weights == "stored" else info.weights
    if not info.of_sets:
        return Contender("all", weights=kind, read_ratio=info.read_ratio)
    if info.keep_ratio == 1:
        return Contender("dense", weights=kind)
    fallback = Fallback.GLOBAL if info.compensated else Fallback.HYBRID
    return Contender("similarity", info.keep_ratio, weights=kind, fallback=fallback, compensated=info.compensated)


def _able(
    language_model: LanguageModel, contenders: list[Contender], decode: DecodeConfig, progress: Progress
) -> list[Contender]:
    """Leave out int8 weights where no engine has them."""
    if not any(contender.weights == "int8" for contender in contenders):
        return contenders
    try:
        check_engine(language_model.model, replace(decode, weights=Weights.INT8))
    except ConfigError as error:
        progress.say(f"Note: int8 weights are left out, as {error}")
        return [contender for contender in contenders if contender.weights != "int8"]
    return contenders


def score_with_log(
    language_model: LanguageModel,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    index: SemanticIndex | None,
    decode: DecodeConfig,
    *,
    seed: int,
    max_tokens: int | None,
    log: Path | None,
    max_new_tokens: int | None = None,
    progress: Progress,
) -> list[Result]:
    """Score contenders on rows; a ``log`` keeps what is finished, and a later run goes on from it.

    Returns:
        The results in the order of the contenders.
    """
    most = most_tokens(language_model, max_tokens)
    setup = {
        "model": weights_checksum(language_model.layers),
        "dtype": language_model.dtype_name,
        "index": index.manifest.identity() if index is not None else None,  # no score's business
        "max_tokens": most,
        "seed": seed,
        "engine": decode.engine,
        "prefill": "sparse" if decode.prefill is Prefill.SPARSE else None,
    }
    wanted = {(str(c), row.set_name, row.id) for c in contenders for row in rows}
    with open_log(log, setup) if log else nullcontext() as file:
        known = [r for r in (read_results(log) if log else []) if (r.contender, r.set_name, r.row_id) in wanted]
        results = score(
            language_model,
            contenders,
            rows,
            index,
            decode=decode,
            max_tokens=most,
            max_new_tokens=max_new_tokens,
            seed=seed,
            finished=known,
            log=file,
            progress=progress,
        )
    order = [str(contender) for contender in contenders]
    return sorted(results, key=lambda result: order.index(result.contender))  # a log may hold them in another
