"""What core neurons are on a model, by `coreinfer-sim analyze`: the numbers behind docs/findings.md."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from coreinfer_sim.base.files import cache_folder
from figures.record import RESULTS, record, slug
from figures.table import REQUIRED, Given, figure
from figures.tools import coreinfer, peak_of, sets_of

FILE = "figures-findings.json"
_EXPERIMENTS = ("alpha-beta", "stability", "similarity", "clusters", "layers", "information")
_MAX_TOKENS = {"alpha-beta": 128}
_LENGTH = 256
_LONG = 1300
"""Characters of a text that may have `_LENGTH` tokens."""
_WORDS = "bag of words"
_MOVES = {(position, more) for position in (16, 64, 128) for more in (8, 16, 32, 64)}


@figure(
    FILE, "DATA", "10 to 30 minutes an experiment for 135 million weights",
    model=REQUIRED, name=None, data=REQUIRED,
)  # fmt: skip
@click.option("--texts", type=click.IntRange(16), default=1000, show_default=True, help="In all, evenly of the sets.")
@click.option("--experiment", "experiments", type=click.Choice(_EXPERIMENTS), multiple=True, default=_EXPERIMENTS)
def analyses(given: Given, texts: int, experiments: tuple[str, ...]) -> None:
    """Every experiment's numbers over all layers, its picture, and its time if it begins now; what was broken off goes on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for experiment in experiments:
            corpus = Path(folder, f"{experiment}.jsonl")
            long = experiment == "stability"
            corpus.write_text(
                "".join(json.dumps(row) + "\n" for row in _mixed(given.data, texts, long)), encoding="utf-8"
            )
            settings = {"corpus.max_tokens": _MAX_TOKENS.get(experiment, _LENGTH)}
            if experiment == "clusters":
                settings |= {
                    "corpus.label_column": "set",
                    "analyze.further_encoders": _bag_of_words(Path(folder, _WORDS)),
                }
            picture = RESULTS / f"finding-{experiment}-{slug(given.name)}.svg"
            words = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
            command = coreinfer(
                "analyze", experiment, corpus, "--model", given.model, "--plot", picture, *words, "--json"
            )
            kept, begin = _kept(), time.perf_counter()
            text, peak = peak_of(command)
            seconds = time.perf_counter() - begin
            found = json.loads(text)
            _record(given.name, found)
            if _kept() - kept:  # begun now: nothing of it had been counted before
                title = f"{given.name}: time of {experiment}"
                record(title, seconds / 60, "minutes", n_texts=found["corpus"]["n_kept"], peak_bytes=peak)


def _kept() -> set[Path]:
    """Return what analyses keep in the cache folder."""
    return set(cache_folder("analyses").iterdir()) if cache_folder("analyses").is_dir() else set()


def _mixed(data: Path, n: int, long: bool) -> list[dict[str, str]]:
    """Draw texts of all sets, as many of each as there are or as are needed."""
    drawn: list[list[dict[str, str]]] = []
    for path in sets_of(data):
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = [f"{row['prompt']}\n{row['completion']}".strip() for row in rows]
        own = [{"text": text, "set": path.stem} for text in dict.fromkeys(texts) if not long or len(text) >= _LONG]
        random.Random(path.stem).shuffle(own)
        drawn.append(own)
    found: list[dict[str, str]] = []
    while len(found) < n and any(drawn):
        found += [own.pop() for own in drawn if own]
    return found[:n]


def _bag_of_words(folder: Path) -> Path:
    """Make an encoder of the default one's word vectors, which knows no order of words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from coreinfer_sim import SentenceEncoder

    whole = SentenceEncoder().model
    words = whole[0].auto_model.get_input_embeddings().weight.detach().float()
    tokenizer = whole.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=words)]).save(str(folder))
    return folder


def _record(model: str, found: dict[str, Any]) -> None:
    """Record the numbers that are of all layers."""
    facts = {"n_texts": found["corpus"]["n_kept"], "n_tokens": found["corpus"]["n_tokens"]}
    last = max((row.get("position", 0) for row in found["rows"]), default=0)
    for row in found["rows"]:
        measure, position, more = row["measure"], row.get("position"), row.get("more")
        is_other = "another text's final" in measure and position != last
        if "layer" in row or is_other or (more is not None and (position, more) not in _MOVES):
            continue
        record(
            f"{model}, {found['experiment']}: {_named(row, found['encoders'])}",
            row["value"],
            "× dense" if "over dense" in measure else "",
            low=row["low"],
            high=row["high"],
            **facts,
        )


def _named(row: dict[str, Any], encoders: list[str]) -> str:
    """Say what a number is of."""
    encoder = row.get("encoder")
    facts = {
        "kept": "{}", "score": "by {}", "clusters": "{}", "k": "{} clusters", "share": "share {}", "position": "at {} tokens",
        "more": "by {} more",
    }  # fmt: skip
    words = [text.format(row[name]) for name, text in facts.items() if row.get(name) is not None]
    words += [f"encoder {Path(encoders[encoder]).name}"] if encoder else []
    return ", ".join([row["measure"], *words])
