"""What an index promises: how few neurons tokens may read, measured on texts that its statistics have not seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig
from coreinfer_sim.base.files import write_json
from coreinfer_sim.base.progress import Progress, counted
from coreinfer_sim.base.rows import CorpusReport, Row
from coreinfer_sim.engines.registry import check_engine
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.evaluation.run import evaluate
from coreinfer_sim.evaluation.summary import summarise
from coreinfer_sim.evaluation.tune import FEWEST_ROWS, READ_RATIOS, choose_profile
from coreinfer_sim.generation.opening import laid_out_model
from coreinfer_sim.index.compensated import Refit
from coreinfer_sim.index.manifest import ProfileInfo
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import dense_bytes

MAX_INCREASE = 0.03
"""Of perplexity, that a build promises to stay below."""
HELD_OUT_FILE = "held-out.jsonl"
_PROFILE_FILE = "profile.json"
_FEWEST_TEXTS = 200
"""With fewer, what is held out would be missed in the statistics."""
_OF_MANY, _MOST = 60, 40  # one text of so many is held out, and at most so many
_SHORTEST = 32  # tokens of a text, of which half are scored
_MAX_TOKENS = 512


def held_out(sentences: Sequence[Row]) -> list[int]:
    """Return the numbers of the texts that are left out of the statistics: some of those that are long enough, evenly spaced."""
    able = [number for number, sentence in enumerate(sentences) if sentence.n_tokens >= _SHORTEST]
    n = min(_MOST, max(FEWEST_ROWS + 2, len(sentences) // _OF_MANY))
    if len(sentences) < _FEWEST_TEXTS or len(able) < n:
        return []
    return [able[place * len(able) // n] for place in range(n)]


def hold_out(report: CorpusReport, sentences: Sequence[Row], folder: Path) -> list[Row]:
    """Write what is held out into the build folder; return the others, with which the report then agrees."""
    numbers = set(held_out(sentences))
    held = [sentence for number, sentence in enumerate(sentences) if number in numbers]
    write_json(folder / HELD_OUT_FILE, [asdict(row) for row in held])
    report.n_held_out = len(held)
    report.n_kept -= len(held)
    report.n_tokens -= sum(row.n_tokens for row in held)
    return [sentence for number, sentence in enumerate(sentences) if number not in numbers]


def measure_promise(
    folder: Path,
    language_model: LanguageModel,
    histograms: Mapping[str, np.ndarray],
    refit: Refit | None,
    seed: int,
    lay_out: bool,
    progress: Progress,
) -> ProfileInfo | None:
    """Find the fewest neurons that tokens may read, as `choose_profile` does, on the second half of each text that was held out.

    Args:
        folder: of the build.
        language_model: that the index is built for.
        histograms: that the index will hold.
        refit: likewise.
        seed: of the bootstrap.
        lay_out: lay its weights out as a start with this profile reads them, rather than beside the model in memory.
        progress: receives what comes of it.

    Returns:
        What decodes by default, or None where nothing can be promised, so that decode is dense.
    """
    path = folder / _PROFILE_FILE
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return None if kept is None else ProfileInfo(**kept)
    profile = _measure(folder, language_model, histograms, refit, seed, lay_out, progress)
    write_json(path, None if profile is None else asdict(profile))
    return profile


def _measure(
    folder: Path,
    language_model: LanguageModel,
    histograms: Mapping[str, np.ndarray],
    refit: Refit | None,
    seed: int,
    lay_out: bool,
    progress: Progress,
) -> ProfileInfo | None:
    # 1) whether there is anything to measure
    texts = [Row(**row) for row in json.loads((folder / HELD_OUT_FILE).read_text(encoding="utf-8"))]
    config = DecodeConfig()
    engine = check_engine(language_model.model, config)[0][0]
    if not engine.reads_by_token:
        progress.say(f"Nothing is promised, as the engine {engine.name} reads all neurons: decode is dense.")
        return None
    if engine.is_sparse_by_itself(language_model.model, language_model.layers, config):
        progress.say("Nothing is promised, as decode reads only what ReLU does not set to zero, which loses nothing.")
        return None
    if not texts:
        progress.say(
            f"Nothing is promised, which takes {_FEWEST_TEXTS} texts, some of them of {_SHORTEST} tokens or more: decode is "
            "dense until 'coreinfer-sim tune' has measured what it may leave out."
        )
        return None
    # 2) scores, by weights that lie as decode will read them
    rows = [_halved(row, number) for number, row in enumerate(texts)]
    laid_out = laid_out_model(language_model.name, ModelConfig(), config, True, progress) if lay_out else None
    kind = "stored" if laid_out is None and getattr(language_model.model, "own_codes", {}) else "16bit"
    contenders = [Contender("all", weights=kind, read_ratio=ratio) for ratio in READ_RATIOS]
    results = evaluate(
        laid_out or language_model,
        contenders,
        rows,
        max_tokens=_MAX_TOKENS,
        progress=progress,
        histograms=histograms,
        refit=refit,
    )
    if len({result.row_id for result in results}) < FEWEST_ROWS:
        progress.say("Nothing is promised, as too few of the texts that were held out have two tokens to score.")
        return None
    # 3) what they allow
    layout = engine.layout_by_token(language_model.model, language_model.layers, config)
    profile = choose_profile(
        contenders, summarise(results, seed), MAX_INCREASE, dense_bytes(language_model.layers), {kind: layout}
    )
    if profile.of_sets:
        progress.say(
            f"No read ratio keeps perplexity within {MAX_INCREASE:.0%} of the dense model's on {counted(len(rows), 'text')} that "
            "were held out: decode is dense."
        )
        return None
    progress.say(
        f"Tokens read {profile.read_ratio:g} of the neurons by default: perplexity {profile.ratio - 1:+.1%} "
        f"({profile.low - 1:+.1%} to {profile.high - 1:+.1%}) on {counted(len(rows), 'text')} that were held out, at most "
        f"{MAX_INCREASE:+.0%} promised."
    )
    return profile


def _halved(row: Row, number: int) -> Row:
    """Return a text whose second half is to be scored, divided at a space where there is one."""
    middle = len(row.text) // 2
    space = row.text.rfind(" ", 1, middle)
    place = space if space > middle // 2 else middle
    return Row(f"{number} {row.id}", row.text[:place], completion=row.text[place:], set_name="held out")
