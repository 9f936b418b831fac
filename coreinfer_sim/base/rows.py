"""Rows of a corpus or prompt file: one reader for builds, evaluation, tuning and generation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any

from coreinfer_sim.base.chats import Conversation, last_question, plain
from coreinfer_sim.base.columns import Columns, RowText
from coreinfer_sim.base.corpus_files import set_name
from coreinfer_sim.base.errors import ChatTemplateError, ConfigError, CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import CorpusConfig
from coreinfer_sim.base.sources import Source, open_source
from coreinfer_sim.base.text_files import lines_of, mended

_BLOCK = 1000
_OF_BUILDS = ("template", "limit", "max_tokens", "deduplicate")
"""Settings that only a build and an analysis look at."""

Tokenize = Callable[[list[str]], list[list[int]]]
Render = Callable[[Conversation], str]


@dataclass(frozen=True)
class Row:
    """One row of a corpus, or of a set that is evaluated on."""

    id: str
    prompt: str
    """What a user would type; it is embedded."""
    text: str = ""
    """What the language model reads in a build."""
    n_tokens: int = 0
    """Tokens of ``text`` that the language model reads, after cutting."""
    completion: str = ""
    """A good answer, which evaluation scores."""
    set_name: str = ""
    """Name of the evaluated set."""
    history: Conversation = ()
    """The conversation up to the prompt, where the row is one."""
    label: str = ""
    """What kind of text it is, where a column says so."""

    @property
    def digest(self) -> str:
        """Tells prompt and completion from others that come under the same id."""
        whole = "\0".join([*("\0".join(turn) for turn in self.history[:-1]), self.prompt, self.completion])
        return hashlib.sha256(whole.encode("utf-8")).hexdigest()[:16]


@dataclass
class CorpusReport:
    """What became of the rows."""

    n_rows: int = 0
    n_kept: int = 0
    n_tokens: int = 0
    n_empty: int = 0
    n_duplicate: int = 0
    n_cut: int = 0
    """Texts cut to the largest number of tokens."""
    n_tokens_cut: int = 0
    """Tokens lost by that."""
    sha256: str = ""
    """Over every kept row's prompt and text."""
    n_mended: int = 0
    """Rows that held what is no Unicode text, read as U+FFFD."""
    n_refused: int = 0
    """Conversations that the model's chat template refuses."""
    n_held_out: int = 0
    """Texts that thresholds and fits do not see, to measure on what the index promises."""
    n_other_parts: int = 0
    """Rows with parts of messages that are no text, such as images."""
    first_mended: str = ""
    """Where the first of them is."""
    first_refused: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return asdict(self)

    def note(self, found: RowText, where: str) -> None:
        """Count what was mended or left out in a row."""
        if found.n_mended:
            self.n_mended += 1
            self.first_mended = self.first_mended or where
        self.n_other_parts += bool(found.n_other_parts)

    def remarks(self) -> list[str]:
        """Say what was left out, mended, and what could not be read."""
        parts = [f"{counted(self.n_empty, 'empty row')} dropped"] if self.n_empty else []
        if self.n_mended:
            parts.append(
                f"{counted(self.n_mended, 'row')} with U+FFFD for what is no Unicode text ({self.first_mended})"
            )
        if self.n_refused:
            parts.append(f"{counted(self.n_refused, 'conversation')} left out ({self.first_refused})")
        if self.n_other_parts:
            parts.append(f"{counted(self.n_other_parts, 'row')} with parts that are no text, which are left out")
        return parts

    def __str__(self) -> str:
        """Say in one line what was kept, dropped and cut."""
        parts = [
            f"{counted(self.n_kept, 'prompt')} with {counted(self.n_tokens, 'token')} kept of {counted(self.n_rows, 'row')}"
        ]
        if self.n_duplicate:
            parts.append(f"{counted(self.n_duplicate, 'duplicate')} dropped")
        if self.n_held_out:
            parts.append(f"{counted(self.n_held_out, 'text')} held out, to measure what is promised")
        parts += self.remarks()
        if self.n_cut:
            parts.append(f"{counted(self.n_cut, 'text')} cut, {counted(self.n_tokens_cut, 'token')} lost")
        return "; ".join(parts)


def read_corpus(config: CorpusConfig, tokenize: Tokenize, render: Render = plain) -> tuple[Iterator[Row], CorpusReport]:
    """Open a corpus and stream its rows.

    Args:
        config: where it is and how a row becomes text.
        tokenize: texts → token ids, special tokens included.
        render: a conversation → the text that the model reads; what raises ChatTemplateError is left out.

    Returns:
        The rows that are neither empty nor duplicates, and the report, which is complete once they have been drawn.

    Raises:
        CorpusError: it cannot be opened, lacks a column, or nothing is left.
    """
    report = CorpusReport()
    return _kept_rows(config, tokenize, render, report), report


def _kept_rows(config: CorpusConfig, tokenize: Tokenize, render: Render, report: CorpusReport) -> Iterator[Row]:
    digest = hashlib.sha256()
    texts = _texts(config, render, report)
    while block := list(islice(texts, _block_size(config, report))):
        texts_of_block = [text for _, _, text, _ in block]
        for (row_id, prompt, text, label), ids in zip(block, tokenize(texts_of_block), strict=True):
            if not ids:
                report.n_empty += 1
                continue
            n_tokens = min(len(ids), config.max_tokens)
            report.n_cut += len(ids) > n_tokens
            report.n_tokens_cut += len(ids) - n_tokens
            report.n_kept += 1
            report.n_tokens += n_tokens
            digest.update(f"{len(prompt)}:{prompt}{len(text)}:{text}{label}".encode())
            yield Row(row_id, prompt, text, n_tokens, label=label)
    if report.n_kept == 0:
        why = f"; {report.first_refused}" if report.n_refused else ""
        raise CorpusError(
            f"the corpus {config.source} holds no usable text ({report.n_rows} rows, {report.n_empty} empty{why}), expected at "
            "least one row with text; check the file and prompt_column."
        )
    report.sha256 = digest.hexdigest()


def describe_corpus(config: CorpusConfig) -> str:
    """Say in one line how a corpus will be read: cheap, before a model loads.

    Raises:
        CorpusError: it cannot be opened, or its first rows lack a column.
    """
    return _opened(config)[1].described()


def _texts(config: CorpusConfig, render: Render, report: CorpusReport) -> Iterator[tuple[str, str, str, str]]:
    """Draw (id, prompt, text, label) of the rows that are neither empty nor duplicates."""
    seen: set[bytes] = set()
    for where, row_id, found in _rows(*_opened(config), report):
        try:
            text = render(found.turns) if found.turns and found.prompt else found.text or found.prompt
        except ChatTemplateError as error:
            report.n_refused += 1
            report.first_refused = report.first_refused or f"{where}: {error}"
            continue
        if not found.prompt or not text:
            report.n_empty += 1
            continue
        key = hashlib.sha1(f"{found.prompt}\0{text}".encode(), usedforsecurity=False).digest()
        if config.deduplicate and key in seen:
            report.n_duplicate += 1
            continue
        seen.add(key)
        yield row_id, found.prompt, text, found.label


def _opened(config: CorpusConfig) -> tuple[Source, Columns]:
    source = open_source(config)
    return source, Columns.of(config, source)


def _rows(source: Source, columns: Columns, report: CorpusReport) -> Iterator[tuple[str, str, RowText]]:
    """Draw place in words, id and texts of every row, and count it."""
    for number, (place, values) in enumerate(source.rows(columns.names)):
        found, where = columns.texts(values, place), f"{source.unit} {place:,}"
        report.n_rows = number + 1
        report.note(found, where)
        row_id = values.get("id")
        yield where, str(number if row_id is None else row_id), found


def _block_size(config: CorpusConfig, report: CorpusReport) -> int:
    """Return how many texts to tokenise at once: no more than the limit still lets in."""
    return _BLOCK if config.limit is None else min(_BLOCK, config.limit - report.n_kept)


def load_rows(path: Path) -> list[Row]:
    """Read the rows that a build has drawn from its corpus."""
    with path.open(encoding="utf-8") as file:
        return [Row(**json.loads(line)) for line in file]


def read_prompts(config: CorpusConfig, report: CorpusReport) -> Iterator[Row]:
    """Draw the prompts of a corpus, with the conversation up to each; empty ones are left out and counted in ``report``.

    Raises:
        CorpusError: as for `read_corpus`.
        ConfigError: a setting that only a build looks at was given.
    """
    check_no_build(config)
    for _, row_id, found in _rows(*_opened(config), report):
        if found.prompt:
            question = last_question(found.turns)
            yield Row(row_id, found.prompt, history=() if question is None else found.turns[: question + 1])
        else:
            report.n_empty += 1


def read_lines(raw: BufferedIOBase, name: str, report: CorpusReport) -> Iterator[Row]:
    """Draw the lines of a stream as prompts, as they come; blank ones are no rows.

    Raises:
        CorpusError: it is no text, or in another encoding than UTF-8, or UTF-16 with its mark.
    """
    for number, line in enumerate(lines_of(raw, name), 1):
        text = mended(line).strip()
        report.note(RowText(text, n_mended=mended(line) != line), f"line {number:,}")
        if text:
            yield Row(str(number), text)


def read_completions(config: CorpusConfig, report: CorpusReport) -> Iterator[Row]:
    """Draw prompts with completions: of two columns, or of a conversation's last answer; the set is called after the file.

    Rows without prompt or completion are left out and counted in ``report``.

    Raises:
        CorpusError: as for `read_corpus`, or there are no completions.
        ConfigError: a setting that only a build looks at was given.
    """
    check_no_build(config)
    source, columns = _opened(config)
    if not columns.has_completions():
        raise CorpusError(
            f"{config.source} has prompts in {columns.prompt!r} and no completions, expected prompt and completion, or "
            "conversations; name a column in completion_column."
        )
    name = set_name(config.source)
    for _, row_id, found in _rows(source, columns, report):
        turns = found.turns
        answer = max(
            (n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.content.strip()), default=0
        )
        question = last_question(turns[:answer])
        if question is None:
            report.n_empty += 1
            continue
        prompt, completion = turns[question].content, turns[answer].content
        history = turns[:answer] if columns.are_chats else ()
        yield Row(row_id, prompt, completion=completion, set_name=name, history=history)


def check_no_labels(config: CorpusConfig) -> None:
    """Raise ConfigError for the setting that only an analysis looks at."""
    if config.label_column is not None:
        raise ConfigError("corpus.label_column is of analyses, and does nothing here; leave it out.")


def check_no_build(config: CorpusConfig) -> None:
    """Raise ConfigError for settings that only builds and analyses look at."""
    check_no_labels(config)
    defaults = {field.name: field.default for field in fields(CorpusConfig)}
    for name in _OF_BUILDS:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"corpus.{name} is of builds, and does nothing here; leave it out.")
