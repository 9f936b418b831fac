"""Work that was broken off goes on only with the settings that it was begun with."""

from __future__ import annotations

from typing import Any

_SHORT = 40
"""Characters of two values that a message can show."""


def differing(found: Any, wanted: dict[str, Any], group: str = "") -> list[str]:
    """Return the settings that differ: their names, and both values where these are short.

    Args:
        found: settings of the earlier run, as they were read.
        wanted: those of this one, by name; groups of settings are dictionaries in it.
        group: put before the names.
    """
    names: list[str] = []
    for name, value in wanted.items():
        other = found.get(name) if isinstance(found, dict) else None
        if isinstance(value, dict) and isinstance(other, dict):
            names += differing(other, value, "compensation " if name == "compensation" else group)
        elif other != value:
            there, here = ("not given" if each is None else str(each) for each in (other, value))
            values = "" if len(there + here) > _SHORT else f" ({there} there, {here} here)"
            names.append(f"{group}{name}{values}")
    return names
