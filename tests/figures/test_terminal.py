"""The recording of the command line: what a terminal showed, and for how long."""

from __future__ import annotations

import re
import shlex
import sys
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner

from figures.run import main

_SVG = "{http://www.w3.org/2000/svg}"


def test_a_line_stands_until_another_takes_its_place(tmp_path):
    pytest.importorskip("pyte")
    code = "import time; print('one <1>', flush=True); time.sleep(0.3); print('\\033[1Atwo    ')"
    out = tmp_path / "shown.svg"
    done = CliRunner().invoke(
        main, ["terminal-recording", "--picture", str(out), f"{sys.executable} -c {shlex.quote(code)}"]
    )
    assert done.exit_code == 0, done.output
    texts = ET.fromstring(out.read_text(encoding="utf-8")).findall(f"{_SVG}text")
    shown = {}
    for each in texts:
        stands = each.find(f"{_SVG}set")
        begin = float(re.sub(r"play\.begin\+|s", "", stands.get("begin")))
        shown.setdefault("".join(part.text for part in each.findall(f"{_SVG}tspan")), []).append(
            (begin, begin + float(stands.get("dur").rstrip("s")))
        )
    (first,), (second,) = shown["one <1>"], shown["two"]
    assert first[1] == pytest.approx(second[0], abs=0.02) and second[0] - first[0] > 0.2 and second[1] > second[0] + 1
    typed = [text for text in shown if text.startswith("$")]
    assert len(typed) > 20 and all(command.startswith(min(typed, key=len)) for command in typed)


def test_a_command_that_fails_is_named(tmp_path):
    pytest.importorskip("pyte")
    command = f"{sys.executable} -c 'raise SystemExit(3)'"
    done = CliRunner().invoke(main, ["terminal-recording", "--picture", str(tmp_path / "none.svg"), command])
    assert done.exit_code == 1 and "ended with exit code 3, expected 0" in done.output
    assert not (tmp_path / "none.svg").exists()
