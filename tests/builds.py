"""What tests of builds share: a corpus, what an index holds, and ways to break a build off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from coreinfer_sim_cli.main import main

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.index.index import SemanticIndex

FILES = (
    *("centroids.faiss", "neurons.safetensors", "sums.safetensors", "clusters.jsonl"),
    *("map.safetensors", "manifest.json"),
)


TOPICS = {
    "space": ["stars", "planets", "galaxies", "comets", "moons"],
    "food": ["bread", "cheese", "soup", "salad", "cake"],
    "law": ["contracts", "courts", "judges", "appeals", "statutes"],
}


CONFIG = BuildConfig(clusters=3, shard_size=8)


AS_OPTIONS = ["--clusters", "3", "--workers", "1", "--threads", "1"]


LANGUAGE_MODEL_STAGE = "Language model"


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an index, its manifest without what depends on the place of the folder."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    found = {name: (folder / name).read_bytes() for name in FILES}
    raw = json.loads(found["manifest.json"])
    for part, field in ((raw, "sha256"), (raw["model"], "relative_path"), (raw["encoder"], "relative_path")):
        part.pop(field, None)
    return {**found, "manifest.json": json.dumps(raw).encode()}


def assert_nothing_loads(folder: Path) -> None:
    """Look at every folder, hidden ones too."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        with pytest.raises(IndexFormatError):
            SemanticIndex.load(path)


class StopAt(Progress):
    """Breaks a build off, as Ctrl-C does, when a stage begins or ends."""

    def __init__(self, stage: str, end: bool = False) -> None:
        self._stage, self._end, self._now = stage, end, ""

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self._now = stage
        if stage == self._stage and not self._end:
            raise KeyboardInterrupt

    def finish(self) -> None:
        if self._now == self._stage and self._end:
            raise KeyboardInterrupt


def command(corpus: str, model: str, out: Path, *more: str, shard_size: int = 8) -> Result:
    """Run build-index in this process."""
    options = [*AS_OPTIONS, "--set", f"build.shard_size={shard_size}", *more]
    return CliRunner().invoke(main, ["build-index", corpus, "--model", model, "--out", str(out), *options])
