"""Texts of strangers, as they may be shown."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"
"""Format characters that some scripts and emoji need."""
_SHOWN_AS_SPACE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what moves a terminal's cursor, turns the direction of writing, or ends a line."""


def plain(text: str) -> str:
    """Return a text in one line, its white space single and without characters that a terminal would obey."""
    shown = (
        " " if unicodedata.category(character) in _SHOWN_AS_SPACE and character not in _JOINERS else character
        for character in text
    )
    return " ".join("".join(shown).split())
