"""The map of an index' prompts and its report: what they take to make, and whether the report is sound."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click

from coreinfer_sim.base.progress import Progress
from figures.page import browser, found_by_axe
from figures.record import at_most, exactly, record
from figures.table import DEMO_INDEX, DEMO_MODEL, ROOT, Given, figure
from figures.tools import coreinfer, output_of, seconds_of

FILE = "figures-findings.json"


class _Stages(Progress):
    """Notes when each stage began and ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._now: tuple[str, float] | None = None

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self.finish()
        self._now = stage, time.perf_counter()

    def finish(self) -> None:
        if self._now is not None:
            stage, begin = self._now
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        self._now = None


@figure(FILE, "the demo's model", "10 minutes", timed=True, model=DEMO_MODEL, name=None)
@click.option("--limit", default=400, show_default=True, help="Prompts of the demo's corpus.")
def drawing(given: Given, limit: int) -> None:
    """Time of a build's map over that of all else in the build."""
    from coreinfer_sim import BuildConfig, CorpusConfig, build_index

    stages = _Stages()
    corpus = CorpusConfig(
        str(ROOT / "demo" / "corpus.jsonl"), prompt_column="prompt", template="{prompt}\n{completion}", limit=limit
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = seconds_of(
            build_index,
            given.model,
            corpus,
            Path(folder, "index"),
            BuildConfig(clusters=10),
            threads=2,
            progress=stages,
        )
    of_map = stages.seconds["Drawing the map"]
    title = f"{given.name}, {limit} prompts: time of the map over that of all else in a build"
    seconds = {stage: round(each, 2) for stage, each in stages.seconds.items()}
    record(title, of_map / (whole - of_map), "share", at_most(0.03), seconds={"whole": round(whole, 1), **seconds})


@figure(FILE, "an index, Chromium, playwright, axe-playwright-python", "1 minute", timed=True, index=DEMO_INDEX)
def report(given: Given) -> None:
    """Time and size of a report, and what is wrong with it in a browser, light and dark, desk and phone."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.html")
        seconds = seconds_of(output_of, coreinfer("report", given.index, "-o", out))
        with browser() as chromium:
            errors, elsewhere, axe = found_by_axe(chromium, out.as_uri())
        size = out.stat().st_size / 1e6
    record("report: time to make it, from the command on", seconds, "s", at_most(10))
    record("report: its size", size, "MB", at_most(5))
    record("report: errors in the console", len(errors), "errors", exactly(0), which=errors)
    record("report: requests that leave the machine", len(elsewhere), "requests", exactly(0), which=elsewhere)
    record("report: what axe-core finds, light and dark, desk and phone", len(axe), "violations", exactly(0), which=axe)


@figure("docs/images", "an index with a map", "5 seconds", index=DEMO_INDEX, out=ROOT / "docs" / "images")
def pictures(given: Given) -> None:
    """Draw the map of an index and what its topics have in common, as the README shows them; it measures nothing."""
    from coreinfer_sim import SemanticIndex
    from coreinfer_sim.base.plots import save_plot
    from coreinfer_sim.index.plot import map_chart
    from coreinfer_sim.reporting.charts import topics_chart
    from coreinfer_sim.reporting.overlap import overlap

    index = SemanticIndex.load(given.index)
    save_plot(map_chart(index.map, index.clusters), given.out / "map.svg")
    save_plot(topics_chart(overlap(index)), given.out / "overlap.svg")
