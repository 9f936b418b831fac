"""The quick look that every Python and every system gets: all modules import, and a corpus becomes a text."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import coreinfer_sim_cli

import coreinfer_sim

PACKAGES = (coreinfer_sim, coreinfer_sim_cli)
OF_EXTRAS = ("altair", "datasets", "fastapi", "lm_eval", "pyarrow", "uvicorn", "vl_convert", "xllamacpp")


_RUN = """
import importlib.metadata, json, sys
extras, commands = (json.loads(each) for each in sys.argv[1:])
from importlib.machinery import PathFinder
def hiding(found, missing):
    return lambda name, *given: missing(name) if name in extras else found(name, *given)
def lacks(name):
    raise importlib.metadata.PackageNotFoundError(name)
PathFinder.find_spec = hiding(PathFinder.find_spec, lambda name: None)
importlib.metadata.Distribution.from_name = hiding(importlib.metadata.Distribution.from_name, lacks)
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
printed = []
for command in commands:
    done = CliRunner().invoke(main, [str(word) for word in command])
    if done.exit_code:
        sys.exit(f'{command}: {done.output} {done.exception!r}')
    printed.append(done.stdout)
print(json.dumps(printed))
"""


def test_every_module_imports():
    failed = []
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=failed.append):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                failed.append(f"{module.name}: {error!r}")
    assert failed == []


def test_a_corpus_becomes_a_text_without_the_extras(tmp_path, tiny_checkpoint):
    """In a process of its own, as libraries remember what they have found."""
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index"
    rows = [
        {"prompt": f"What do {noun} tell us?"} for noun in ("stars", "planets", "comets", "bread", "soup", "cheese")
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    commands = [
        ["build-index", corpus, "--model", tiny_checkpoint, "--out", index, "--clusters", 2, "--workers", 1],
        ["info", index, "--json"],
        ["lookup", index, "Why do stars shine?", "--json"],
        ["generate", "Why do stars shine?", "--index", index, "--model", tiny_checkpoint, "--mode", "similarity",
         "--keep-ratio", 0.5, "--max-new-tokens", 4],
    ]  # fmt: skip
    given = (json.dumps(OF_EXTRAS), json.dumps(commands, default=str))
    done = subprocess.run([sys.executable, "-c", _RUN, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(found[1]) and json.loads(found[2]) and found[3].strip()


def test_threads_wait_for_each_other_briefly_unless_the_user_says_otherwise():
    """While other programs need the cores, threads that spin for milliseconds take decode to a twentieth."""
    said = "import os, coreinfer_sim; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for own, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        done = subprocess.run([sys.executable, "-c", said], env=plain | own, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
