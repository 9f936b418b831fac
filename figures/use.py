"""Use: what a reader has to take in, how fast commands answer, and from nothing to the first answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from figures.record import at_most, exactly, record
from figures.table import ROOT, Given, figure

FILE = "figures-use.json"
_PAGES = (
    ROOT / "README.md",
    *(path for part in ("start", "guide") for path in sorted((ROOT / "docs" / part).glob("*.md"))),
)
_MOST_OPTIONS = {"run": 15, "generate": 15, "build-index": 12}
_COMMON = ("as_json", "settings", "help")
"""Options that every command has."""
_MOST_WORDS = 20


def prose(text: str) -> str:
    """Return what is read of a text in Markdown: without code, tables, pictures, headings and links' targets."""
    text = re.sub(r"(?ms)^(`{3,})[^\n]*\n.*?^\1\s*$", "\n\n", text)
    text = re.sub(r"(?m)^(?: {4}|\t).*$", "", text)
    text = re.sub(r"(?m)^\s*(\||#|!\[|<!--).*$", "\n", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a prose; an item of a list ends one."""
    parts = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text)
    found = [each for part in parts for each in re.split(r"(?<=[.!?])[*)\"']*\s+", " ".join(part.split()))]
    return [each for each in found if words(each)]


def words(sentence: str) -> int:
    """Return how many words a sentence has."""
    return sum(bool(re.search(r"\w", each)) for each in sentence.split())


def help_texts() -> Iterator[tuple[str, str]]:
    """Yield each text of the commands' help: what a command does, and what each of its options does."""
    from cli.main import main

    def of(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
        blocks = (command.help or "").split("\n\n")
        yield name, "\n\n".join(block for block in blocks if "\b" not in block)
        for param in command.params:
            if isinstance(param, click.Option) and param.help and not param.hidden:
                yield f"{name} {param.opts[0]}", re.sub(r"\s*\[default: .*\]$", "", param.help)
        if isinstance(command, click.Group):
            for child in command.commands.values():
                if not child.hidden:
                    yield from of(child, f"{name} {child.name}")

    yield from of(main, "coreinfer-sim")


def long_sentences(texts: Iterator[tuple[str, str]], most: int = _MOST_WORDS) -> list[tuple[int, str, str]]:
    """Return the sentences of named texts that have more words than a reader takes in at once, longest first."""
    found = [(words(each), name, each) for name, text in texts for each in sentences(text)]
    return sorted((each for each in found if each[0] > most), reverse=True)


@figure(FILE, "", "2 seconds")
@click.option("--list", "is_listed", is_flag=True, help="Print every sentence of more than twenty words.")
def words_and_options(_given: Given, is_listed: bool) -> None:
    """README's size, options of each command, and the longest sentences of README, pages and help."""
    from cli.main import main

    readme = ROOT / "README.md"
    record("README", readme.read_bytes().count(b"\n"), "lines", at_most(180))
    record("README, size", round(readme.stat().st_size / 1000, 1), "kB")
    n_options = {
        name: len(
            {each.name for each in command.params if isinstance(each, click.Option) and not each.hidden} - {*_COMMON}
        )
        for name, command in main.commands.items()
        if not command.hidden and not isinstance(command, click.Group)
    }
    for name, most in _MOST_OPTIONS.items():
        record(f"options of {name}", n_options[name], "options, without --help, --json and --set", at_most(most))
    record("options of all commands", sum(n_options.values()), "options", which=n_options)
    for what, texts in (
        ("README, docs/start and docs/guide", lambda: ((path.name, prose(path.read_text("utf-8"))) for path in _PAGES)),
        ("the help of all commands", help_texts),
    ):
        longest = max((words(each), each) for _, text in texts() for each in sentences(text))
        too_long = long_sentences(texts())
        record(f"longest sentence of {what}", longest[0], "words", which=longest[1])
        record(f"sentences of more than {_MOST_WORDS} words in {what}", len(too_long), "sentences")
        if is_listed:
            print("\n".join(f"{n:3d}  {name}: {each}" for n, name, each in too_long))


@figure(FILE, "", "20 seconds", timed=True, rounds=5)
def answers(given: Given) -> None:
    """Seconds of `--help`, `list` and `show demo`: each a process of its own, median of the rounds after one to warm up."""
    for arguments, most in ((["--help"], 0.3), (["list"], 1.0), (["show", "demo"], 1.0)):
        command = [str(_program()), *arguments]
        taken = [_seconds(command) for _ in range(given.rounds + 1)][1:]
        name = f"coreinfer-sim {' '.join(arguments)}"
        record(name, statistics.median(taken), "s, median", at_most(most), all=[round(each, 3) for each in taken])


def _program() -> Path:
    """Return the command as it is installed beside this Python."""
    found = shutil.which("coreinfer-sim", path=str(Path(sys.executable).parent))
    if found is None:
        raise click.UsageError("coreinfer-sim is not installed beside this Python; run: pip install -e .")
    return Path(found)


def _seconds(command: list[str], **env: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **env})
    return time.perf_counter() - begin


@figure(FILE, "git, a package index, 4 GB of disk", "5 minutes a Python", timed=True)
@click.option("--python", "interpreter", default=sys.executable, help="Python of the empty environment.")
@click.option("--tool", type=click.Choice(["pip", "uv"]), default="pip", help="What installs.")
def first_answer(_given: Given, interpreter: str, tool: str) -> None:
    """From nothing to the first answer: the wheel and its extra `demo` into an empty environment, the model, and `demo`, twice.

    The first `demo` also compiles the loops, and Python its libraries; the second is a later start.
    """
    version = json.loads(_out([interpreter, "-c", "import sys; print(list(sys.version_info[:2]))"]))
    name = f"Python {version[0]}.{version[1]}, {tool}"
    with tempfile.TemporaryDirectory() as folder:
        wheel, venv = _wheel(Path(folder)), Path(folder, "venv")
        subprocess.run([interpreter, "-m", "venv", str(venv)], check=True)
        inside = venv / "bin" / "python"
        install = [str(inside), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        if tool == "uv":
            install = [
                str(Path(sys.executable).parent / "uv"),
                "pip",
                "install",
                "--quiet",
                "--no-cache",
                f"--python={inside}",
            ]
        taken = _seconds([*install, "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[demo]"])
        size = sum(path.stat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
        record(f"{name}: install of the wheel with its extra demo", taken, "s")
        record(f"{name}: what the install takes on the disk", round(size / 1e6), "MB")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as on a user's machine
        own = {part: str(Path(folder, part)) for part in ("COREINFER_SIM_CACHE", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
        # the numba cache of the package lies in its folders, which are new
        demo = [str(venv / "bin" / "coreinfer-sim"), "demo"]
        fetch = [str(inside), "-m", "coreinfer_sim_cli.demo_model"]
        record(f"{name}: fetching the model, 98 MB", _seconds(fetch, **own), "s")
        record(f"{name}: demo, first time", _seconds(demo, **own), "s", at_most(60))
        record(f"{name}: demo, second time", _seconds(demo, **own), "s", at_most(60))


@figure(FILE, "git, twine", "1 minute")
def packages(_given: Given) -> None:
    """Wheel and sdist: their sizes, and that twine finds nothing to say."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = _wheel(Path(folder), "--sdist", "--wheel")
        for kind, path in (("wheel", wheel), ("sdist", next(wheel.parent.glob("*.tar.gz")))):
            record(f"{kind}, size", round(path.stat().st_size / 1e6, 2), "MB")
        done = subprocess.run(
            [sys.executable, "-m", "twine", "check", "--strict", *map(str, wheel.parent.iterdir())], check=False
        )
        record("twine check --strict", done.returncode, "exit code", exactly(0))


def _wheel(folder: Path, *kinds: str) -> Path:
    """Build the wheel, and what else is named, from a clean copy of what git knows."""
    source, out = folder / "source", folder / "dist"
    source.mkdir()
    names = _out(["git", "-C", str(ROOT), "ls-files", "-z"]).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        *(kinds or ("--wheel",)),
        "--outdir",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(out.glob("*.whl"))


def _out(command: list[str]) -> Any:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
