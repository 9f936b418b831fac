"""What an index promises: how few neurons tokens may read, measured on texts that its thresholds and fits have not seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig
from coreinfer_sim.base.files import write_json
from coreinfer_sim.base.processes import Report
from coreinfer_sim.base.rows import Row
from coreinfer_sim.building.histograms import kept_histograms, layout_bytes
from coreinfer_sim.building.refit import read_refit
from coreinfer_sim.engines.registry import check_engine
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.evaluation.results import Result
from coreinfer_sim.evaluation.run import evaluate
from coreinfer_sim.evaluation.summary import summarise
from coreinfer_sim.evaluation.tune import FEWEST_ROWS, by_token_and_dense, choose_profiles
from coreinfer_sim.fitting.clustered_corpus import UNSEEN_FILE, ClusteredCorpus
from coreinfer_sim.fitting.workers import Workers
from coreinfer_sim.generation.opening import laid_out_model
from coreinfer_sim.index.manifest import ProfileInfo, RefitInfo
from coreinfer_sim.models.loading import LanguageModel

HELD_OUT_FILE = "held-out.jsonl"
_PROFILES_FILE, _PARTS_FOLDER = "profiles.json", "promise"
_FEWEST_TEXTS = 200
"""With fewer, what is held out would be missed where thresholds are measured."""
_OF_MANY, _MOST = 60, 40  # one text of so many is held out, and at most so many
_SHORTEST = 32  # tokens of a text, of which half are scored
_MAX_TOKENS = 512
_ROWS_AT_ONCE = 10  # in a part: each has to lay weights out once


def held_out(sentences: Sequence[Row]) -> list[int]:
    """Return the numbers of the texts that nothing is fitted to: some of those that are long enough, evenly spaced."""
    able = [number for number, sentence in enumerate(sentences) if sentence.n_tokens >= _SHORTEST]
    n = min(_MOST, max(FEWEST_ROWS + 2, len(sentences) // _OF_MANY))
    if len(sentences) < _FEWEST_TEXTS or len(able) < n:
        return []
    return [able[place * len(able) // n] for place in range(n)]


def hold_out(sentences: Sequence[Row], folder: Path) -> int:
    """Write into the build folder which texts are held out; return how many."""
    numbers = held_out(sentences)
    write_json(folder / HELD_OUT_FILE, [asdict(sentences[number]) for number in numbers])
    write_json(folder / UNSEEN_FILE, numbers)
    return len(numbers)


@dataclass
class ScoreHeldOut:
    """The job that scores contenders on some of the texts that were held out; it reports texts."""

    rows: Sequence[Row]
    contenders: Sequence[Contender]
    refit: RefitInfo | None
    lay_out: bool
    """Whether the model's weights lie as a start by token reads them, rather than beside the model in memory."""
    _laid_out: LanguageModel | None = None
    """The model in that layout, which is mapped from where it was laid out."""

    def result(self, corpus: ClusteredCorpus, number: int) -> Path:
        """Return where a part's scores will be."""
        return corpus.folder / _PARTS_FOLDER / f"{number:06d}.json"

    def run(self, corpus: ClusteredCorpus, number: int, report: Report) -> None:
        """Leave the scores of one part on disk."""
        language_model, folder = corpus.language_model, corpus.folder
        rows = self.rows[number * _ROWS_AT_ONCE : (number + 1) * _ROWS_AT_ONCE]
        if self.lay_out and self._laid_out is None:
            self._laid_out = laid_out_model(language_model.name, ModelConfig(), DecodeConfig(), True)
        results = evaluate(
            self._laid_out or language_model,
            self.contenders,
            rows,
            max_tokens=_MAX_TOKENS,
            histograms=kept_histograms(folder),
            refit=None if self.refit is None else read_refit(folder, self.refit, language_model),
        )
        write_json(self.result(corpus, number), [asdict(result) for result in results])
        report(len(rows))


def measure_promise(workers: Workers, refit: RefitInfo | None, lay_out: bool) -> dict[str, ProfileInfo]:
    """Find how few neurons tokens may read, as `choose_profiles` does, on the second half of each text that was held out.

    Args:
        workers: of the build, whose folder holds the histograms.
        refit: of the index that will be.
        lay_out: lay its weights out as a start by token reads them, rather than beside the model in memory.

    Returns:
        Profiles by name; none where nothing can be promised, so that decode is dense.
    """
    path = workers.corpus.folder / _PROFILES_FILE
    if path.exists():
        return {name: ProfileInfo(**kept) for name, kept in json.loads(path.read_text(encoding="utf-8")).items()}
    profiles = _measure(workers, refit, lay_out)
    write_json(path, {name: asdict(profile) for name, profile in profiles.items()})
    return profiles


def _measure(workers: Workers, refit: RefitInfo | None, lay_out: bool) -> dict[str, ProfileInfo]:
    corpus, progress = workers.corpus, workers.progress
    language_model, folder = corpus.language_model, corpus.folder
    # 1) whether there is anything to measure
    texts = [Row(**row) for row in json.loads((folder / HELD_OUT_FILE).read_text(encoding="utf-8"))]
    config = DecodeConfig()
    engine = check_engine(language_model.model, config)[0][0]
    if not engine.reads_by_token:
        progress.say(f"Nothing is promised, as the engine {engine.name} reads all neurons: decode is dense.")
        return {}
    if engine.is_sparse_by_itself(language_model.model, language_model.layers, config):
        progress.say("Nothing is promised, as decode reads only what ReLU does not set to zero, which loses nothing.")
        return {}
    if not texts:
        progress.say(
            f"Nothing is promised, as that takes {_FEWEST_TEXTS} texts, some of {_SHORTEST} tokens or more, which this corpus "
            "has not: decode is dense until 'coreinfer-sim tune' has measured what it may leave out."
        )
        return {}
    # 2) scores, by weights that lie as decode will read them
    rows = [_halved(row, number) for number, row in enumerate(texts)]
    laid_out = laid_out_model(language_model.name, ModelConfig(), config, True, progress) if lay_out else None
    kind = "stored" if laid_out is None and getattr(language_model.model, "own_codes", {}) else "16bit"
    contenders = by_token_and_dense(kind)
    job = ScoreHeldOut(rows, contenders, refit, laid_out is not None)
    del laid_out  # each worker maps it for itself
    (folder / _PARTS_FOLDER).mkdir(exist_ok=True)
    sizes = {
        number: min(_ROWS_AT_ONCE, len(rows) - begin) for number, begin in enumerate(range(0, len(rows), _ROWS_AT_ONCE))
    }
    n_bytes = layout_bytes(language_model)
    workers.run(job, "Evaluating", "texts", sizes, sizes, n_bytes, n_bytes)
    paths = [job.result(corpus, number) for number in sizes]
    results = [Result(**each) for path in paths for each in json.loads(path.read_text(encoding="utf-8"))]
    if len({result.row_id for result in results}) < FEWEST_ROWS:
        progress.say("Nothing is promised, as too few of the texts that were held out have two tokens to score.")
        return {}
    # 3) what they allow
    layout = engine.layout_by_token(language_model.model, language_model.layers, config)
    profiles = choose_profiles(contenders, summarise(results, corpus.config.seed), {kind: layout})
    for name, profile in profiles.items():
        progress.say(f"Profile {name}: {profile.in_words()}.")
    return profiles


def _halved(row: Row, number: int) -> Row:
    """Return a text whose second half is to be scored, divided at a space where there is one."""
    middle = len(row.text) // 2
    space = row.text.rfind(" ", 1, middle)
    place = space if space > middle // 2 else middle
    return Row(f"{number} {row.id}", row.text[:place], completion=row.text[place:], set_name="held out")
