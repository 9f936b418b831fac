"""The texts of an analysis: drawn from the corpus once, kept on disk, and read in blocks of a random order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.files import write_atomic
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.rows import CorpusReport, Row, read_corpus
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.models.prompts import rendered

BLOCK = 32
"""Texts that are compared with one another."""
MOST_LABELS = 256
_LENGTH_STEP = 16


class Texts:
    """Texts on disk in a random order; in memory are where each begins and its place, 16 bytes a text."""

    def __init__(self, path: Path, begins: np.ndarray, report: CorpusReport, labels: Sequence[str], seed: int) -> None:
        """Read what `draw` wrote.

        Args:
            path: a JSON row a line.
            begins: where each line begins, [n_texts].
            report: of the corpus.
            labels: that occur.
            seed: of the order.
        """
        self._path, self._begins, self.report, self.labels = path, begins, report, labels
        self._order = np.random.default_rng(seed).permutation(len(begins))

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def n_blocks(self) -> int:
        """Blocks, of which the last may be smaller."""
        return -(-len(self) // BLOCK)

    def block(self, number: int) -> list[Row]:
        """Return the texts of one block."""
        return list(self.rows(number * BLOCK, (number + 1) * BLOCK))

    def rows(self, begin: int, end: int) -> Iterator[Row]:
        """Draw some texts of the random order."""
        with self._path.open("rb") as file:
            for place in self._order[begin:end]:
                file.seek(int(self._begins[place]))
                yield Row(**json.loads(file.readline()))


def draw(path: Path, corpus: CorpusConfig, tokenizer: Any, seed: int, progress: Progress) -> Texts:
    """Draw the texts of a corpus into a file.

    Raises:
        CorpusError: as for `read_corpus`, or there are too many labels.
    """
    rows, report = read_corpus(
        corpus,
        lambda texts: tokenizer(texts, verbose=False)["input_ids"],
        partial(rendered, tokenizer, "the model"),
    )
    begins: list[int] = []
    labels: set[str] = set()

    def write(part: Path) -> None:
        with part.open("wb") as file:
            for row in rows:
                begins.append(file.tell())
                labels.add(row.label)
                if len(labels) > MOST_LABELS:
                    raise CorpusError(
                        f"the column {corpus.label_column!r} of {corpus.source} has more than {MOST_LABELS} different labels, "
                        "expected the name of a kind of text in each row; name another column in label_column."
                    )
                file.write(json.dumps(asdict(row)).encode() + b"\n")
                progress.advance(1)

    progress.start("Reading the corpus", corpus.limit, "texts")
    try:
        write_atomic(path, write)
    finally:
        progress.finish()
    known = sorted(labels) if corpus.label_column is not None else []
    return Texts(path, np.array(begins, np.int64), report, known, seed)


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids of some texts of a block."""

    places: np.ndarray
    """Of the texts in the block, [n_rows]."""
    input_ids: torch.Tensor
    """[n_rows, n_positions]."""
    attention_mask: torch.Tensor
    """1 for tokens, 0 for padding, [n_rows, n_positions]."""

    @property
    def starts(self) -> np.ndarray:
        """Where each text begins among the tokens without padding, and the total, [n_rows + 1]."""
        return np.concatenate([[0], np.cumsum(self.attention_mask.sum(1).cpu().numpy())])


def batches(ids: Sequence[Sequence[int]], pad: int, max_tokens: int, tokens_at_once: int) -> Iterator[Batch]:
    """Pad texts of about the same length together.

    Args:
        ids: of the texts of a block.
        pad: id of padding.
        max_tokens: of any text.
        tokens_at_once: in a batch, padding included; a text that is longer is alone.
    """
    order = sorted(range(len(ids)), key=lambda place: (-len(ids[place]), place))
    while order:
        n_positions = min(-(-len(ids[order[0]]) // _LENGTH_STEP) * _LENGTH_STEP, max_tokens)
        n_rows = max(1, tokens_at_once // n_positions)
        here, order = order[:n_rows], order[n_rows:]
        input_ids = torch.full((len(here), n_positions), pad)
        mask = torch.zeros_like(input_ids)
        for row, place in enumerate(here):
            input_ids[row, : len(ids[place])] = torch.tensor(ids[place])
            mask[row, : len(ids[place])] = 1
        yield Batch(np.array(here), input_ids, mask)
