"""The house itself: its plan, its size, how fast it opens, and that texts and speed are what they were before."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from figures.record import at_least, at_most, exactly, record
from figures.table import DEMO_INDEX, DEMO_MODEL, REQUIRED, ROOT, Given, figure
from figures.tools import demo_prompts, generated, in_turns, medians, output_of, python, seconds_of, spread

FILE = "figures-house.json"
_COUNT_OPTIONS = """
import click, json
from cli.main import main
names = ("generate", "build-index")
print(json.dumps({name: sum(isinstance(each, click.Option) for each in main.commands[name].params) for name in names}))
"""
_log = click.Path(exists=True, dir_okay=False, path_type=Path)


def _lines(tree: Path, *folders: str) -> dict[str, int]:
    """Return the lines of each Python file in some folders of a tree, as ``wc -l`` counts them."""
    paths = (path for folder in folders for path in (tree / folder).rglob("*.py"))
    return {path.relative_to(tree).as_posix(): path.read_bytes().count(b"\n") for path in paths}


def _layout() -> Any:
    """Return the module of the test that holds the layout."""
    spec = importlib.util.spec_from_file_location("test_layout", ROOT / "tests" / "test_layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@figure(FILE, "", "10 seconds")
def plan(_given: Given) -> None:
    """Rooms, imports, circles, and the longest file."""
    layout = _layout()
    against, circles = layout.against_the_order(), layout.circles()
    record("imports against the order of rooms", len(against), "imports", exactly(0), which=against)
    record("modules that import themselves by way of others", len(circles), "modules", exactly(0), which=circles)
    package = ROOT / "coreinfer_sim"
    flat = sorted(path.name for path in package.glob("*.py") if path.name != "__init__.py")
    record("modules flat at the top of the package", len(flat), "modules", exactly(0), which=flat)
    lines = _lines(ROOT, "coreinfer_sim", "cli")
    longest = max(lines, key=lambda name: lines[name])
    record("longest file of coreinfer_sim and cli", lines[longest], "lines", at_most(350), which=longest)
    rooms = {room: len(list((package / room).rglob("*.py"))) for room in layout.ROOMS}
    largest = max(rooms, key=lambda name: rooms[name])
    record("files in the largest room", rooms[largest], f"files, in {largest}", of_rooms=rooms)


@figure(FILE, "a checkout of the earlier revision", "10 seconds", before_tree=REQUIRED)
def size(given: Given) -> None:
    """Lines and options, before and after, and the lines of the engine that a test defines."""
    parts: dict[str, tuple[str, ...]] = {
        "coreinfer_sim and cli": ("coreinfer_sim", "cli"),
        "tests": ("tests",),
        "figures, data_scripts and demo": ("benchmarks", "figures", "data_scripts", "demo"),
    }
    for what, folders in parts.items():
        before, after = (sum(_lines(tree, *folders).values()) for tree in (given.before_tree, ROOT))
        bar = at_most(16_200) if "cli" in folders else None
        record(f"lines of {what}", after, f"lines; {before:,} before", bar, before=before)
    counted = [json.loads(output_of(python(tree, _COUNT_OPTIONS))) for tree in (given.before_tree, ROOT)]
    for name, before in counted[0].items():
        record(f"options of {name}", counted[1][name], f"options; {before} before", before=before)
    engine = _own_engines()
    record("lines of the engine that a test defines", sum(engine.values()), "lines", at_most(60), which=engine)


def _own_engines() -> dict[str, int]:
    """Return the lines of each engine that the tests write on the bare face, by file and class."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "Engine" in (ast.unparse(base) for base in node.bases):
                name = f"{path.relative_to(ROOT).as_posix()}: {node.name}"
                found[name] = (node.end_lineno or node.lineno) - node.lineno + 1
    if not found:
        raise click.ClickException("no test derives a class from Engine, so there is no figure of it.")
    return found


@figure(FILE, "", "30 seconds", timed=True, index=DEMO_INDEX, rounds=5)
def start(given: Given) -> None:
    """How long `coreinfer-sim --help` and `info` take."""
    command = shutil.which(
        "coreinfer-sim", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if command is None:
        raise click.ClickException("coreinfer-sim is not installed; run: pip install --editable .")

    commands = {"--help": [command, "--help"], "info INDEX": [command, "info", str(given.index)]}
    quiet: dict[str, Any] = {"check": True, "capture_output": True}
    found = in_turns(commands, given.rounds, lambda what, _: seconds_of(subprocess.run, commands[what], **quiet))
    for (what, seconds), most in zip(found.items(), (0.3, 1.5), strict=True):
        middle = statistics.median(seconds)
        record(f"coreinfer-sim {what}", middle, "s, median", at_most(most), spread=spread(seconds, 3))


@figure(FILE, "pytest, or its output in files", "8 minutes")
@click.option("--before-log", type=_log, help="Output of the earlier revision's `make test`.")
@click.option("--after-log", type=_log, help="Output of this one's.  [default: run it]")
def tests(_given: Given, before_log: Path | None, after_log: Path | None) -> None:
    """Tests that pass, before and after, and how long they take."""
    if after_log is None:
        done = subprocess.run(["make", "test"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        after = outcome(done.stdout)
    else:
        after = outcome(after_log.read_text(encoding="utf-8"))
    before = {} if before_log is None else outcome(before_log.read_text(encoding="utf-8"))
    unit = "tests" + (f"; {before['passed']:g} before" if before else "")
    record("tests passed", int(after["passed"]), unit, before=before, after=after)
    wrong = int(after.get("failed", 0) + after.get("errors", 0) + after.get("error", 0))
    record("tests failed", wrong, "tests", exactly(0))
    record("make test", after["seconds"], "s", at_most(480))


def outcome(output: str) -> dict[str, float]:
    """Return the counts by outcome, and the seconds, of pytest's last line."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ passed.* in [\d.]+s", line)]
    if not lines:
        raise click.ClickException(
            "pytest's last line, with how many tests passed and in how many seconds, is missing."
        )
    counts = {match[2]: float(match[1]) for match in re.finditer(r"(\d+) ([a-z]+)", lines[-1].partition(" in ")[0])}
    found = re.search(r" in ([\d.]+)s", lines[-1])
    assert found is not None
    return {**counts, "seconds": float(found[1])}


@figure(
    FILE, "a checkout of the earlier revision, the demo's model", "5 minutes",
    before_tree=REQUIRED, model=DEMO_MODEL, name=None, index=DEMO_INDEX, keep_ratio=0.8, new_tokens=64,
)  # fmt: skip
def texts(given: Given) -> None:
    """Greedy texts of the demo's prompts, dense and sparse, before and after, through each tree's command line."""
    for mode, ratio in (("dense", None), ("similarity", given.keep_ratio)):
        settings: dict[str, Any] = {"chat": True, "index": given.index, "mode": mode, "keep_ratio": ratio}
        before, after = (generated(given, demo_prompts(), tree=tree, **settings) for tree in (given.before_tree, ROOT))
        differ = [
            {"prompt": a["prompt"], "before": a["text"], "after": b["text"]}
            for a, b in zip(before, after, strict=True)
            if a["text"] != b["text"]
        ]
        what = f"{given.name}, {mode}{f' at keep ratio {ratio:g}' if ratio else ''}"
        unit = f"of {len(before)} prompts × {given.new_tokens} tokens"
        engines = {"before": before[0].get("engine"), "after": after[0].get("engine")}
        title = f"{what}: greedy texts of the demo that are as before"
        record(title, len(before) - len(differ), unit, exactly(len(before)), engines=engines, differ=differ)


@figure(
    FILE, "a checkout of the earlier revision, the demo's model", "20 minutes", timed=True,
    before_tree=REQUIRED, model=DEMO_MODEL, name=None, keep_ratio=0.4, new_tokens=128, rounds=5,
)  # fmt: skip
def speed(given: Given) -> None:
    """Decode of the lean engine before and after, dense and sparse, bfloat16 and int8: processes that take turns."""
    prompts, trees = (
        demo_prompts()[:1] * 6,
        {"before": given.before_tree, "after": ROOT},
    )  # a process takes long to begin
    with tempfile.TemporaryDirectory() as cache:
        for kind, mode in itertools.product(("bfloat16", "int8"), ("dense", "random")):
            ratio = given.keep_ratio if mode == "random" else None
            # before, the stored weights of a GGUF file were those that it is widened to
            weights = {"before": "stored", "after": "bf16"} if kind == "bfloat16" else dict.fromkeys(trees, kind)
            settings: dict[str, Any] = {"mode": mode, "keep_ratio": ratio, "dtype": "bfloat16"}
            settings |= {"engine": "lean", "min_new_tokens": given.new_tokens}

            def measure(
                when: str, _number: int, settings: dict[str, Any] = settings, weights: dict[str, str] = weights
            ) -> float:
                of = {**settings, "weights": weights[when]}
                runs = generated(given, prompts, tree=trees[when], cache=Path(cache, when), **of)
                return statistics.median(run["tokens_per_second"] for run in runs)

            found = in_turns(trees, given.rounds, measure)
            middle = medians(found)
            record(
                f"{given.name}, lean engine, {'dense' if ratio is None else f'keep ratio {ratio:g}'}, "
                f"{kind}: decode over that before",
                middle["after"] / middle["before"],
                "×, of medians",
                at_least(0.98),
                of_rounds=spread([b / a for a, b in zip(found["before"], found["after"], strict=True)], 3),
                tokens_per_second={when: [middle[when], *spread(found[when])] for when in trees},
            )
