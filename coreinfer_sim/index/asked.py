"""What a server was asked: how many prompts came to each topic, and how many of them were unfamiliar. No texts are kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.files import write_json
from coreinfer_sim.index.manifest import Manifest


@dataclass(frozen=True)
class Asked:
    """Counts by topic; a topic that is not named was not asked."""

    since: str
    """Day of the first prompt, such as 2026-11-30."""
    prompts: Counter[int]
    unfamiliar: Counter[int]
    """Of these prompts, by the topic that is nearest all the same."""

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON types."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("prompts", "unfamiliar")}
        return {"since": self.since, **counts}


def asked_file(manifest: Manifest) -> Path:
    """Return where the counts of an index lie, in the user's data folder, whatever the index is called and wherever it lies."""
    folder = platformdirs.user_data_path("coreinfer_sim", appauthor=False) / "asked"
    return folder / f"{manifest.identity()[:16]}.json"


def read_asked(manifest: Manifest) -> Asked | None:
    """Return what servers of an index were asked; None where none has counted.

    Raises:
        IndexFormatError: the file is damaged.
    """
    path = asked_file(manifest)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Asked(str(raw["since"]), _counter(raw["prompts"]), _counter(raw["unfamiliar"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFormatError(
            f"{path} is damaged ({error}), expected counts of prompts by topic; remove it to count anew."
        ) from error


def add_asked(manifest: Manifest, prompts: Counter[int], unfamiliar: Counter[int]) -> None:
    """Add counts to those of an index, to which other processes may add at the same time.

    Raises:
        OSError: they cannot be written.
        IndexFormatError: those that are there are damaged.
    """
    path = asked_file(manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        before = read_asked(manifest) or Asked(date.today().isoformat(), Counter(), Counter())
        now = Asked(before.since, before.prompts + prompts, before.unfamiliar + unfamiliar)
        write_json(path, now.as_dict())


def _counter(raw: dict[str, int]) -> Counter[int]:
    return Counter({int(number): int(n) for number, n in raw.items()})
