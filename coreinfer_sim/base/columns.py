"""Which columns of a corpus are read, and as what: recognised once, by the first rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coreinfer_sim.base.chats import Conversation, Turn, conversation_of, fault_of, is_conversation, last_question
from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.settings import SEPARATORS, CorpusConfig, template_parts
from coreinfer_sim.base.sources import Source, Values
from coreinfer_sim.base.text_files import mended

_CHATS = ("messages", "conversations", "conversation")
_TEXTS = ("prompt", "text")
_ID = re.compile(r"(?i)(.*[_\- ])?(id|ids|uuid|guid|index|idx|key|hash)|__index_level_\d+__|unnamed: \d+|")
_WORD = re.compile(r"[^\s?!]*")
_NUMBER = re.compile(r"[+-]?(\d[\d.,]*)?([eE][+-]?\d+)?%?")


@dataclass
class RowText:
    """What a row holds, as far as it was asked for."""

    prompt: str
    """What is embedded."""
    text: str = ""
    """What the model reads, where a template says so."""
    turns: Conversation = ()
    """The conversation, of which the prompt is the user's last message; none where the row is a text."""
    n_mended: int = 0
    """Values that were no Unicode text, with U+FFFD in place of what is none."""
    n_other_parts: int = 0
    """Parts of messages that are no text."""
    label: str = ""
    """What kind of text it is."""


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and as what."""

    source: Source
    prompt: str | None = None
    """Embedded; a text, or a list of messages."""
    completion: str | None = None
    """Follows the prompt; a text, or a list of messages."""
    template: str | None = None
    has_id: bool = False
    are_chats: bool = False
    """Whether the first rows hold lists of messages."""
    n_tabs: int = 0
    """In each of the first lines of a text file, if there are as many in all of them."""
    label: str | None = None
    """Says what kind of text a row is."""

    @classmethod
    def of(cls, config: CorpusConfig, source: Source) -> Columns:
        """Recognise the columns by a corpus's first rows.

        Raises:
            CorpusError: a named column is missing, or what to read is left open.
        """
        sample = source.sample()
        if not sample:
            raise CorpusError(
                f"the corpus {config.source} holds no row, expected at least one with text; check the file."
            )
        found = replace(cls._recognise(config, source, sample), label=config.label_column)
        for part in source.parts:
            found._check_part(part)
        return found

    @classmethod
    def _recognise(cls, config: CorpusConfig, source: Source, sample: Sequence[Values]) -> Columns:
        names = list(dict.fromkeys(name for values in sample for name in values))
        fields = template_fields(config.template)
        columns = (config.prompt_column, config.completion_column, config.label_column)
        wanted = [name for name in columns if name is not None] + fields
        missing = [name for name in dict.fromkeys(wanted) if name not in names]
        if missing:
            near = [f"{name!r}" for name in names if name.lower() in {each.lower() for each in missing}]
            _check_not_nested(config, sample)
            raise CorpusError(
                f"the corpus {config.source} has the columns {sorted(names)}, expected {', '.join(missing)}; name an existing "
                f"column in prompt_column or template{f', such as {near[0]}' if near else ''}."
            )
        has_id = "id" in names
        names = [name for name in names if name != config.label_column or name == config.prompt_column]
        if config.template is not None and config.prompt_column is None:
            usual = [name for name in _usual(names, _TEXTS) if not _holds_numbers(sample, name)]
            prompt = next((name for name in usual if _holds_text(sample, name)), None)
            return cls(source, prompt, None, config.template, has_id)
        if config.prompt_column is not None:
            prompt, completion = config.prompt_column, config.completion_column
        else:
            prompt, completion = _recognised(config, sample, names)
            completion = config.completion_column or completion
        are_chats = any(is_conversation(values.get(prompt)) for values in sample)
        return cls(source, prompt, completion, config.template, has_id, are_chats, _tabs_of_lines(source, sample))

    def _check_part(self, part: Source) -> None:
        """Raise CorpusError if a file of a folder lacks a column that the others have."""
        names = {name for values in part.sample() for name in values}
        missing = [name for name in self.names if name != "id" and name not in names]
        if names and missing:
            raise CorpusError(
                f"{part.name} has the columns {sorted(names)}, expected {missing[0]} as in another file of its folder; rename "
                "them alike, or name the files one by one."
            )

    @property
    def names(self) -> list[str]:
        """Columns that are read."""
        wanted = [self.prompt, self.completion, *template_fields(self.template), self.label]
        wanted += ["id" if self.has_id else None]
        return list(dict.fromkeys(name for name in wanted if name is not None))

    def described(self) -> str:
        """Say in one line what was recognised."""
        parts = [self.source.name]
        if self.source.separator is not None:
            names = {sign: name for name, sign in SEPARATORS.items() if name.isalpha()}
            parts[0] += f", parted by {names.get(self.source.separator, repr(self.source.separator))}"
        if self.source.chosen:
            parts[0] += f", {self.source.chosen}"
        if self.template is not None:
            embedded = (
                "what the template makes is embedded and read" if self.prompt is None else f"prompts in {self.prompt!r}"
            )
            parts += [embedded] if self.prompt is None else [embedded, "what the template makes is read"]
        elif self.are_chats:
            follows = "" if self.completion is None else f", continued in {self.completion!r}"
            parts.append(
                f"conversations in {self.prompt!r}{follows}: the user's last message is the prompt, the whole is read"
            )
        elif self.completion is not None:
            parts.append(
                f"prompts in {self.prompt!r}, completions in {self.completion!r}: both are read, as a conversation"
            )
        else:
            parts.append(f"prompts in {self.prompt!r}")
        if self.n_tabs:
            parts.append(
                f"a line is a prompt, and each has {counted(self.n_tabs, 'tab')}: name it .tsv if it is a table"
            )
        return "; ".join(parts)

    def texts(self, values: Values, place: int) -> RowText:
        """Return what a row holds.

        Args:
            values: of the row.
            place: of the row in its source, for messages.

        Raises:
            CorpusError: what should be text is a list or an object.
        """
        found = RowText("")
        if self.label is not None:
            found.label = self._text(values, self.label, place, found)
        if self.template is not None:
            fields = {name: self._text(values, name, place, found) for name in template_fields(self.template)}
            parts = template_parts(self.template)
            if any(fields.values()):
                found.text = "".join(fields[part] if is_field else part for part, is_field in parts).strip()
            found.prompt = found.text if self.prompt is None else self._text(values, self.prompt, place, found)
            return found
        turns = self._turns(values, place, found)
        is_text = self.completion is None and not self.has_conversations(values)
        question = last_question(turns)
        found.prompt = "" if question is None else turns[question].content
        found.turns = () if is_text else turns
        return found

    def has_completions(self) -> bool:
        """Tell whether rows hold completions: in a column of their own, or as answers of conversations."""
        return self.template is None and (self.completion is not None or self.are_chats)

    def has_conversations(self, values: Values) -> bool:
        """Tell whether a row is a list of messages."""
        return self.prompt is not None and is_conversation(values.get(self.prompt))

    def _turns(self, values: Values, place: int, found: RowText) -> Conversation:
        turns: list[Turn] = []
        for name, role in ((self.prompt, "user"), (self.completion, "assistant")):
            if name is None:
                continue
            if is_conversation(values.get(name)):
                read, n_other = conversation_of(values[name])
                found.n_other_parts += n_other
                turns += [Turn(turn.role, self._mended(turn.content, found).strip()) for turn in read]
            else:
                text = self._text(values, name, place, found)
                turns += [Turn(role, text)] if text or role == "user" else []
        return tuple(turns)

    def _text(self, values: Values, name: str, place: int, found: RowText) -> str:
        value = values.get(name)
        if not value:
            return ""
        if not isinstance(value, str):
            kind = "a list" if isinstance(value, list) else "an object"
            raise CorpusError(
                f"{self.source.where(place)}: {name} is {kind}, expected text{fault_of(value)}; name a column that holds text, "
                "or a list of messages with role and content as prompt_column without a template."
            )
        return self._mended(value, found).strip()

    @staticmethod
    def _mended(text: str, found: RowText) -> str:
        whole = mended(text)
        found.n_mended += whole != text
        return whole


def template_fields(template: str | None) -> list[str]:
    """Return the columns that a template such as ``"Question: {question}"`` reads; None reads none."""
    return [] if template is None else [part for part, is_field in template_parts(template) if is_field]


def _recognised(config: CorpusConfig, sample: Sequence[Values], names: Sequence[str]) -> tuple[str, str | None]:
    """Return the column of prompts or conversations, and that of completions, if there is one."""
    names = [name for name in names if name.lower() not in _TEXTS or not _holds_numbers(sample, name)]
    first = {name: next((values[name] for values in sample if values.get(name)), None) for name in names}
    chats = [name for name in names if is_conversation(first[name])]
    usual = next((name for name in _usual(names, _CHATS) if name in chats), None)
    if usual is not None:
        return usual, None
    pair = _usual(names, ("prompt", "completion"))
    if len(pair) == 2 and all(name in chats or isinstance(first[name], str) for name in pair):
        return pair[0], pair[1]
    texts = [
        name for name in _usual(names, _TEXTS) if name in chats or first[name] is None or isinstance(first[name], str)
    ]
    if texts:
        return texts[0], None
    if len(chats) == 1:
        return chats[0], None
    others = [name for name in names if _holds_text(sample, name) and not _holds_ids(sample, name)]
    odd = next(iter(_usual(names, (*_CHATS, *_TEXTS))), None)
    if odd is not None:
        kind = "lists" if isinstance(first[odd], list) else "objects" if isinstance(first[odd], dict) else "text"
        raise CorpusError(
            f"the corpus {config.source} has {kind} in the column {odd!r}, expected text, or a list of messages with role and "
            f"content in each row{fault_of(first[odd])}; mend it, or name another column in prompt_column or template."
        )
    if len(others) != 1 or chats:
        _check_not_nested(config, sample)
        known = sorted({name for values in sample for name in values})
        raise CorpusError(
            f"the corpus {config.source} has the columns {known}, and none is called prompt, text or messages and holds "
            "text; name one in prompt_column or template."
        )
    return others[0], None


def _usual(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the columns that have one of some names, in the order of those; capitals do not matter."""
    return [name for each in wanted for name in names if name.lower() == each]


def _holds_text(sample: Sequence[Values], name: str) -> bool:
    return all(values.get(name) is None or isinstance(values[name], str) for values in sample)


def _holds_ids(sample: Sequence[Values], name: str) -> bool:
    """Tell whether a column holds ids rather than prompts: by its name, or as all its values are numbers or single words.

    Writing that puts no spaces between words is not ASCII.
    """
    if _ID.fullmatch(name.strip()):
        return True
    found = _values(sample, name)
    return all(_NUMBER.fullmatch(text) or (text.isascii() and _WORD.fullmatch(text)) for text in found)


def _holds_numbers(sample: Sequence[Values], name: str) -> bool:
    """Tell whether a column holds numbers and nothing else."""
    found = _values(sample, name)
    return bool(found) and all(_NUMBER.fullmatch(text) for text in found)


def _values(sample: Sequence[Values], name: str) -> list[str]:
    return [text for values in sample if values.get(name) and (text := str(values[name]).strip())]


def _tabs_of_lines(source: Source, sample: Sequence[Values]) -> int:
    """Return how many tabs stand in each of the first lines of a text file; 0 where the lines differ."""
    file = source.parts[0] if source.parts else source
    if len(sample) < 2 or not re.search(r"(?i)\.txt(\.gz)?$", file.name):
        return 0
    counts = {str(values.get("text")).count("\t") for values in sample}
    return counts.pop() if len(counts) == 1 else 0


def _check_not_nested(config: CorpusConfig, sample: Sequence[Values]) -> None:
    """Raise CorpusError if a corpus is one object that holds its rows in a list."""
    for name, value in sample[0].items() if len(sample) == 1 else ():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            raise CorpusError(
                f"the corpus {config.source} is one object with its rows in {name!r}, expected the rows at the top; write that "
                "list into a file of its own."
            )
