"""Small inputs that go wrong elsewhere, each tried as a user would: through the command line or a running server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from figures.record import exactly, record
from figures.table import DEMO_INDEX, DEMO_MODEL, ROOT, Given, figure
from figures.tools import coreinfer, python

Found = tuple[bool, str]
"""Whether what a user expects was reached, and the line that was printed."""
TRIALS: list[tuple[str, Callable[[Trial], Found]]] = []
"""By how a row of the table of cases begins, what tries it; a row may have several."""
QUESTION = "How do stars form?"
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class Trial:
    """What a case is tried with."""

    cases: Path
    scratch: Path
    model: Path
    index: Path

    def run(self, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run a command of ours to its end."""
        command = coreinfer(*arguments)
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, cwd=cwd)

    def build(self, corpus: object, *more: object, out: str = "index", model: object = None) -> Build:
        """Build an index of one cluster."""
        folder = self.scratch / out
        shutil.rmtree(folder, ignore_errors=True)
        done = self.run(
            "build-index", corpus, "--model", model or self.model, "--out", folder, "--clusters", 1, "--json", *more
        )
        return Build(done, json.loads(done.stdout) if done.returncode == 0 else {})

    def tiny(self, name: str, *, chat: bool = True) -> Path:
        """Make a tiny model of random weights."""
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny_models import save_tiny_checkpoint

        folder = Path(save_tiny_checkpoint(self.scratch / name))
        if not chat:
            (folder / "chat_template.jinja").unlink()
        return folder

    @contextmanager
    def served(self, *more: object, index: Path | None = None, model: Path | None = None) -> Iterator[Any]:
        """Run a server; yields a client of httpx."""
        import httpx

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        named = ["--index", index or self.index, "--model", model or self.model, "--port", port]
        log = (self.scratch / "serve.log").open("w+")
        process = subprocess.Popen(coreinfer("serve", *named, *more), stdout=log, stderr=log, cwd=ROOT)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                while True:
                    try:
                        client.get("/health")
                        break
                    except httpx.TransportError:
                        if process.poll() is not None:
                            raise click.ClickException((self.scratch / "serve.log").read_text()) from None
                        time.sleep(0.2)
                client.said = (self.scratch / "serve.log").read_text  # type: ignore[attr-defined] - what it printed
                yield client
        finally:
            process.terminate()
            process.wait(60)
            log.close()

    def body(self, name: str) -> Any:
        """Return a request of the cases."""
        return json.loads((self.cases / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Build:
    """A build that has ended."""

    done: subprocess.CompletedProcess[str]
    summary: dict[str, Any]

    @property
    def line(self) -> str:
        """What was said first, or of a failure last."""
        lines = [line for line in self.done.stderr.splitlines() if line.strip()] or [""]
        return lines[-1] if self.done.returncode else next((each for each in lines if "Corpus:" in each), lines[0])

    def read(self, *rows: tuple[str, str]) -> Found:
        """Tell whether these prompts and texts were read, and nothing else, by the corpus's checksum."""
        digest = hashlib.sha256()
        for prompt, text in rows:
            digest.update(f"{len(prompt)}:{prompt}{len(text)}:{text}".encode())
        return self.summary.get("corpus", {}).get("sha256") == digest.hexdigest(), self.line

    def refused(self, *says: str) -> Found:
        """Tell whether the command failed in one sentence that says certain things."""
        return refused(self.done, *says)


def refused(done: subprocess.CompletedProcess[str], *says: str) -> Found:
    """Tell whether a command failed in one sentence that says certain things."""
    lines = (
        [line for line in done.stderr.splitlines() if line.startswith("Error:")]
        or done.stderr.splitlines()[-1:]
        or [""]
    )
    whole = len(lines) == 1 and "Traceback" not in done.stderr and done.returncode in (1, 2)
    return whole and all(re.search(each, lines[0]) is not None for each in says), lines[0]


def trial(row: str) -> Callable[[Callable[[Trial], Found]], Callable[[Trial], Found]]:
    """Return a decorator that enters a function as what tries a row of the table."""

    def register(function: Callable[[Trial], Found]) -> Callable[[Trial], Found]:
        TRIALS.append((row, function))
        return function

    return register


def rows_of(cases: Path) -> list[str]:
    """Return the first cell of every row of the table of cases."""
    lines = (cases / "README.md").read_text(encoding="utf-8").splitlines()
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| input ")]


@figure("inputs.json", "a folder of cases, the demo's model, the extras serve, eval and llamacpp", "15 minutes",
    model=DEMO_MODEL, index=DEMO_INDEX)  # fmt: skip
@click.argument("folder", type=_FOLDER)
@click.option("--only", metavar="TEXT", help="Rows that hold this text alone.")
def cases(given: Given, folder: Path, only: str | None) -> None:
    """Every row of FOLDER's table through the command line or a server: whether what a user expects is reached."""
    from figures import input_trials, model_trials  # noqa: F401 - they enter what is tried

    for row in rows_of(folder):
        if only is not None and only not in row:
            continue
        tried = [function for begin, function in TRIALS if row.startswith(begin)]
        if not tried:
            record(row, "no", "reached", exactly("yes"), printed="nothing tries this row")
        for function in tried:
            with tempfile.TemporaryDirectory() as scratch:
                what = Trial(folder.resolve(), Path(scratch), Path(given.model).resolve(), Path(given.index).resolve())
                try:
                    reached, line = function(what)
                except Exception as error:
                    reached, line = False, f"{type(error).__name__}: {error}"
            line = line.replace(str(what.scratch), "SCRATCH").replace(str(what.cases), "CASES").replace(str(ROOT), ".")
            name = " ".join(str(function.__doc__).split()).rstrip(".")
            record(
                f"{row.partition(',')[0]}: {name}",
                "yes" if reached else "no",
                "reached",
                exactly("yes"),
                printed=line[:400],
            )


def python_of_ours(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout's packages."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        python(ROOT, code, *arguments), capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
