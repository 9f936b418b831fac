"""Running the commands in this process, and what is said of how they end."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from coreinfer_sim_cli.main import main

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.index.index import SemanticIndex

MODES = ["similarity", "hybrid", "stability", "global", "random", "all", "dense"]
TOPICS = {
    "space": ["stars", "planets", "galaxies", "comets", "moons"],
    "food": ["bread", "cheese", "soup", "salad", "cake"],
    "law": ["contracts", "courts", "judges", "appeals", "statutes"],
}
NOUNS = [noun for nouns in TOPICS.values() for noun in nouns]
ONE_PROCESS = ["--workers", "1", "--threads", "1"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
PROCESS = [sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()"]


def call(*arguments: Any, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def setting(name: str, value: Any) -> list[str]:
    """Return the arguments that give a setting by its name, such as ``sample.top_k``."""
    return ["--set", f"{name}={value}"]


def succeeded(*arguments: Any, stdin: str | None = None) -> Result:
    """Run a command that must succeed, with nothing on stderr that moves a terminal's cursor."""
    result = call(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert not CONTROL.search(result.stderr)
    return result


def parsed(*arguments: Any, stdin: str | None = None) -> Any:
    """Run a command with --json and return what it printed."""
    return json.loads(succeeded(*arguments, "--json", stdin=stdin).stdout)


def refused(result: Result, *says: str, code: int = 1) -> str:
    """Check that a command failed in one line on stderr that says certain things, and return the line."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert result.stderr.rstrip().endswith(line)
    for text in says:
        assert re.search(text, line), f"{line!r} lacks {text!r}"
    return line


def nothing_loads(folder: Path) -> None:
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        with pytest.raises(IndexFormatError):
            SemanticIndex.load(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def generated(index: Path, *more: Any, prompt: str = "How do stars form?") -> Any:
    """Generate eight tokens and return what --json prints."""
    return parsed("generate", prompt, "--index", index, "--max-new-tokens", 8, *more)
