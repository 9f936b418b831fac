"""What a token's keys and values depend on besides the tokens before it."""

from __future__ import annotations

from typing import Any

GROWING = {"dynamic", "longrope"}
"""Types of rotary positions whose angles also depend on how long the text is."""


def rope_types(config: Any) -> set[str]:
    """Return the types of a configuration's rotary positions."""
    found = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in found.values() if isinstance(part, dict)] or [found]
    return {part.get("rope_type", "default") for part in parts}


def depends_on_what_follows(config: Any) -> bool:
    """Return whether keys and values of a text's beginning change as it goes on."""
    of_text = config.get_text_config(decoder=True)
    looks_ahead = bool(getattr(of_text, "use_bidirectional_attention", False))
    return looks_ahead or bool(rope_types(of_text) & GROWING)
