"""Conversations that a chat template has rendered: what the user said in them.

How a template marks turns is learned from what it makes of a few conversations whose contents are known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_USER, _ANSWER, _AGAIN, _SYSTEM, _RESULT = (f"zq{name}zq" for name in ("user", "answer", "again", "system", "result"))
"""Contents that no template writes itself."""
_ASKED: dict[str, Any] = {"role": "user", "content": _USER}
_ANSWERED: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
_ASKED_AGAIN: dict[str, Any] = {"role": "user", "content": _AGAIN}
_INSTRUCTED: dict[str, Any] = {"role": "system", "content": _SYSTEM}
_CALL: dict[str, Any] = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}},
}
_SPACE = r"\s"
_UNCLOSED = re.compile(r"[<\[{][^>\]}]*\Z")


@dataclass(frozen=True)
class ChatFormat:
    """How a chat template marks the turns of a conversation."""

    begins: re.Pattern[str]
    """What a conversation begins with; the group ``user`` holds the beginning of a user's turn."""
    first: re.Pattern[str]
    """The beginning of the first turn of the user's, where it is not the conversation's."""
    turn: re.Pattern[str]
    """The end of any turn and the beginning of a user's."""
    end: re.Pattern[str] | None
    """What follows a user's text."""
    last_end: re.Pattern[str]
    """What follows it at the end of the conversation."""
    begins_anyhow: bool
    """Whether a system prompt stands before the first turn without a mark of its own."""
    ends_anyhow: bool
    """Whether a user's text has no mark at its end where no answer follows."""
    tool_mark: str
    """What a tool's result begins with if it stands in a turn of the user's; empty: it does not."""
    system_marks: tuple[str, str] | None
    """What stands around a system prompt within a user's turn."""
    folds: bool
    """Whether a blank line alone parts a system prompt or tools from the user's text within a turn."""

    def user_texts(self, text: str) -> list[str]:
        """Return the user's texts in a rendered conversation, in their order; none: the text is no such conversation."""
        # 1) where turns of the user's begin
        begun = self.begins.match(text)
        if begun is None and not (self.begins_anyhow and self.last_end.search(text)):
            return []
        first = begun if begun is not None and begun["user"] else self.first.search(text, begun.end() if begun else 0)
        if first is None:
            return []
        places = [first.end(), *(found.end() for found in self.turn.finditer(text, first.end()))]
        # 2) what is in them
        said = []
        for place, after in zip(places, [*places[1:], None], strict=True):
            content = self._content(text[place:after], is_last=after is None)
            if content and not (self.tool_mark and content.startswith(self.tool_mark)):
                said.append(content)
        return said

    def _content(self, rest: str, is_last: bool) -> str:
        """Return what the user says at the beginning of ``rest``; nothing, if nothing ends it."""
        found = self.last_end.search(rest) if is_last else None
        if found is None and self.end is not None:
            found = self.end.search(rest)
        if found is None and not (is_last and self.ends_anyhow):
            return ""
        content = rest[: None if found is None else found.start()].strip()
        if self.system_marks is not None and content.startswith(self.system_marks[0]):
            content = content.partition(self.system_marks[1])[2].strip()
        return content


def template_of(tokenizer: Any) -> tuple[str, dict[str, str]] | None:
    """Return a tokenizer's chat template and the special tokens that it may name; None: it has none."""
    try:
        template: str = tokenizer.get_chat_template()
    except (AttributeError, ValueError):
        return None
    return template, {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def chat_format(template: str, special_tokens: Mapping[str, str]) -> ChatFormat | None:
    """Learn how a template marks turns; None: it cannot be told.

    Args:
        template: in Jinja.
        special_tokens: by their names in it, such as ``bos_token``.
    """
    return _learned(template, tuple(sorted(special_tokens.items())))


@lru_cache(maxsize=16)
def _learned(template: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatFormat | None:
    special = dict(special_tokens)

    def render(messages: Sequence[dict[str, Any]], prompts: bool = False, **more: Any) -> str | None:
        """Return a conversation, with the beginning of an answer if ``prompts``; None: the template refuses it."""
        options = {**special, **more, "add_generation_prompt": prompts}
        try:
            rendered: Any = render_jinja_template([list(messages)], chat_template=template, **options)
        except Exception:  # a template raises whatever it likes
            return None
        return str(rendered[0][0])

    asked, whole = render([_ASKED], prompts=True), render([_ASKED, _ANSWERED, _ASKED_AGAIN], prompts=True)
    if asked is None or whole is None or not all(part in whole for part in (_USER, _ANSWER, _AGAIN)):
        return None
    found = _Lessons(render, asked, whole, special)
    return found.format() if found.opening else None


class _Lessons:
    """What is learned of a template, one rendered conversation after the other."""

    def __init__(self, render: Callable[..., str | None], asked: str, whole: str, special: dict[str, str]) -> None:
        """Read the marks of turns off two questions with an answer between them."""
        after_user, after_answer = _between(whole, _USER, _ANSWER), _between(whole, _ANSWER, _AGAIN)
        bos = special.get("bos_token", "")
        self._bos = "" if bos in after_user else bos  # some use it as the mark of every turn
        self._fillers = [special[name] for name in ("bos_token", "eos_token", "pad_token") if special.get(name)]
        self._user_end = _shared(_behind(render([_ASKED]) or whole, _USER), after_user)
        answer_end = _shared(_behind(render([_ASKED, _ANSWERED]) or whole, _ANSWER), after_answer)
        self._final = _behind(whole, _AGAIN)
        answer = os.path.commonprefix([after_user, self._final])[len(self._user_end) :].split()
        self._answer = answer[0] if answer else ""
        self.opening = self._trimmed(after_answer[len(answer_end) :])
        """Of a user's turn; empty: there is none."""
        self._ends = [answer_end, self._user_end]
        self._heads = [self._head(_before(asked, _USER))]
        self._marks: tuple[str, str] | None = None
        self._folds = self._anyhow = False
        if self.opening:
            self._read_system(render([_INSTRUCTED, _ASKED], prompts=True) or "")
            self._read_tools(render([_ASKED], prompts=True, tools=[_TOOL]) or "", asked)
        self._tool_mark = self._read_tool_result(render) if self.opening else ""

    def format(self) -> ChatFormat:
        """Make patterns of it."""
        opening, end, final = _flexible(self.opening), _flexible(self._user_end), _flexible(self._final)
        heads = [_flexible(head) for head in self._heads if head]
        fillers = [
            re.escape(each) for each in dict.fromkeys(self._fillers)
        ]  # twice the same would be tried in all orders
        ends = [_flexible(each) for each in self._ends]
        bounds = [rf"{each}\s*" for each in dict.fromkeys(ends) if each] or [r"(?<=\n)"]
        turn = rf"(?:{'|'.join(bounds)})(?:{re.escape(self._bos)}\s*)?{opening}"
        follows = "|".join([re.escape(self._answer), opening, *heads, *fillers, r"\Z"])
        follows = rf"(?=\s*(?:{follows}))" if self._answer else ""
        end_of_text = end + follows if end else re.escape(self._answer)
        return ChatFormat(
            begins=re.compile(
                rf"(?:{'|'.join([*fillers, _SPACE])})*?(?:(?P<user>{opening})|{'|'.join(heads) or '(?!)'})"
            ),
            first=re.compile(turn if all(ends) else opening),
            turn=re.compile(turn),
            end=re.compile(end_of_text) if end_of_text else None,
            last_end=re.compile(rf"(?:{'|'.join(each for each in (final, end) if each) or '(?!)'})\s*\Z"),
            begins_anyhow=self._anyhow,
            ends_anyhow=not end,
            tool_mark=self._tool_mark,
            system_marks=self._marks,
            folds=self._folds,
        )

    def _read_system(self, system: str) -> None:
        """Look for a system prompt before the first turn of the user's, or within it."""
        if not 0 <= system.find(_SYSTEM) < system.find(_USER):
            return
        before, parting = _before(system, _SYSTEM), _between(system, _SYSTEM, _USER)
        if self.opening in before:
            mark = before.rpartition(self.opening)[2].strip()
            self._marks = (mark, parting.strip()) if mark and parting.strip() else None
            self._folds = self._marks is None
        elif self.opening in parting:
            self._heads.append(self._head(before))
            self._ends.append(parting.rpartition(self.opening)[0])
            self._anyhow = not self._trimmed(before)
            if self._anyhow:
                self._heads.append(self._bos)

    def _read_tools(self, tools: str, asked: str) -> None:
        """Look for descriptions of tools before the first turn of the user's, or within it."""
        before, there, rest = _before(tools, _USER).rpartition(self.opening)
        if tools == asked or not there or _USER not in tools:
            return
        if rest.strip():
            self._folds = True
        else:
            self._heads.append(self._head(before))
            self._ends.append(before.rpartition("}")[2] or self._ends[0])

    def _read_tool_result(self, render: Callable[..., str | None]) -> str:
        """Return what stands between the beginning of a user's turn and a tool's result within it."""
        calls = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        result = {"role": "tool", "name": "f", "tool_call_id": _CALL["id"], "content": _RESULT}
        found = render([_ASKED, calls, result], tools=[_TOOL]) or ""
        _, there, rest = _between(found, _USER, _RESULT).rpartition(self.opening)
        return rest.strip() if there and _RESULT in found else ""

    def _head(self, before: str) -> str:
        """Return by what a conversation is known that does not begin with the user: the mark of that turn, or its text."""
        before = self._trimmed(before)
        if not before or not self.opening or before.startswith(self.opening):
            return ""
        word = before.split()[0]
        return before.removesuffix(self.opening).strip() if word[0].isalnum() else word

    def _trimmed(self, text: str) -> str:
        """Drop a first token that tokenizers put there, too."""
        return text.strip().removeprefix(self._bos).strip()


def _before(text: str, content: str) -> str:
    return text.partition(content)[0]


def _behind(text: str, content: str) -> str:
    return text.rpartition(content)[2]


def _between(text: str, before: str, after: str) -> str:
    return _before(text.partition(before)[2], after)


def _shared(one: str, other: str) -> str:
    """Return what two texts begin with, without half a mark."""
    return _UNCLOSED.sub("", os.path.commonprefix([one, other]))


def _flexible(text: str) -> str:
    """Return a pattern of a text whose white space may differ."""
    return r"\s*".join(re.escape(word) for word in text.split())
