"""Texts of strangers, as they may be shown."""

from __future__ import annotations

import unicodedata

_EXCERPT_LENGTH = 160
_JOINERS = "\u200c\u200d"
"""Format characters that some scripts and emoji need."""
_SHOWN_AS_SPACE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what moves a terminal's cursor, turns the direction of writing, or ends a line."""
_NO_CHARACTER = 0xFFFE
"""And 0xFFFF, of each plane: no text holds them, and no XML may."""


def plain(text: str) -> str:
    """Return a text in one line, its white space single and without characters that a terminal would obey."""
    return " ".join("".join(character if _is_shown(character) else " " for character in text).split())


def _is_shown(character: str) -> bool:
    if ord(character) & _NO_CHARACTER == _NO_CHARACTER:
        return False
    return character in _JOINERS or unicodedata.category(character) not in _SHOWN_AS_SPACE


def excerpt(text: str) -> str:
    """Return a text's beginning, at most 160 characters, as `plain` makes it."""
    return plain(" ".join(text.split())[:_EXCERPT_LENGTH])
