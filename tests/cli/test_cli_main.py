"""Help, usage errors, and how every command ends: on damage, on Ctrl-C, and where nobody reads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from commands import PROCESS, call, refused, succeeded

from coreinfer_sim.index.index import SemanticIndex

WORK = ["run", "build-index", "generate", "evaluate", "tune", "bench", "analyze", "export", "serve"]
INDEXES = [
    "status",
    "list",
    "show",
    "report",
    "check",
    "diff",
    "extend",
    "merge",
    "recluster",
    "rm",
    "push",
    "pull",
    "info",
    "lookup",
]
COMMANDS = ["demo", *WORK, *INDEXES, "cache"]


def test_help_does_not_import_torch():
    script = shutil.which("coreinfer-sim", path=str(Path(sys.executable).parent)) or shutil.which("coreinfer-sim")
    assert script, "the command is not installed; run 'pip install -e .'"
    run = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("Usage: coreinfer-sim [OPTIONS] [COMMAND]")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", run.stdout, re.MULTILINE)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "coreinfer_sim_cli" in imported and "click" in imported
    assert not imported & {"torch", "transformers", "datasets", "faiss", "numba", "numpy", "sentence_transformers"}
    assert not imported & {"lm_eval", "altair", "vl_convert", "rouge_score", "sacrebleu"}


def test_no_commands_help_imports_torch():
    code = (
        "import sys; from coreinfer_sim_cli.main import main\n"
        f"for command in {COMMANDS}:\n"
        "    main([command, '--help'], standalone_mode=False)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("Usage:") == len(COMMANDS)
    assert not {"torch", "transformers", "datasets", "faiss", "numpy"} & set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help(command, option):
    result = succeeded(command, option)
    assert f"{command} [OPTIONS]" in result.stdout
    assert ("--json" in result.stdout) is (command not in ("serve", "rm"))
    assert ("--set GROUP.NAME=VALUE" in result.stdout) is (command in (*WORK, "check", "extend", "recluster"))
    assert result.stderr == ""


def test_the_version_is_that_of_the_package():
    assert succeeded("--version").stdout.strip() == f"coreinfer-sim, version {version('coreinfer-sim')}"


def test_the_version_with_what_it_stands_on(tmp_path, monkeypatch):
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "COREINFER_SIM_CACHE", "COREINFER_SIM_MODELS"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for arguments in (["--version", "-v"], ["-v", "--version"]):
        first, *lines = succeeded(*arguments).stdout.splitlines()
        found = dict(line.split(maxsplit=1) for line in lines)
        assert first == succeeded("--version").stdout.strip() and found["torch"] == version("torch")
        assert found["processor"] and found["features"] and found["cache"] == str(tmp_path / "COREINFER_SIM_CACHE")
        assert found["indexes"].startswith(str(tmp_path / "XDG_DATA_HOME")) and found["settings"].endswith(
            "config.toml"
        )
        assert found["models"].split(", ")[0] == str(tmp_path / "COREINFER_SIM_MODELS")
    refused(call("-v"), "-v is of --version", code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["build-index"],
        ["build-index", "corpus.jsonl", "--out", "x"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--clusters", "many"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--clusters", "²"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--limit", "0"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--workers", "0"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--set", "build.batch=3"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--set", "build.batch_size=many"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--limit", "3", "--set", "corpus.limit=4"],
        ["config", "set", "serve.port", "many"],
        ["config", "set", "sample.top_k", "many"],
        ["config", "set", "sample.topk", "4"],
        ["lookup", "index"],
        ["lookup", "index", "prompt", "-k", "0"],
        ["lookup", "index", "prompt", "--score", "best"],
        ["generate", "prompt", "--mode", "oracle"],
        ["generate", "prompt", "--temperature", "-1"],
        ["generate", "prompt", "--set", "sample.top_p"],
        ["generate", "prompt", "--set", "sample.topp=0.5"],
        ["generate", "prompt", "--set", "sample.top_p=much"],
        ["generate", "prompt", "--set", "corpus.split=test"],
        ["generate", "prompt", "--keep-ratio", "0.5", "--set", "select.keep_ratio=0.6"],
        ["generate", "prompt", "--max-new-tokens", "0"],
        ["generate", "--file", "/nowhere/prompts.txt"],
        ["generate", "prompt", "--sparsity", "0.4"],
    ],
    ids=" ".join,
)
def test_usage_errors_end_with_2(arguments):
    refused(call(*arguments), code=2)


def test_an_unknown_engine_is_a_usage_error(index):
    for given in (["--engine", "best"], ["--set", "decode.engine=best"]):
        refused(
            call("generate", "stars", "--index", index, *given), "no engine 'best', expected auto or one of", code=2
        )


def test_a_prompt_and_a_file_are_too_much(tmp_path):
    (tmp_path / "prompts.txt").touch()
    refused(call("generate", "prompt", "--file", tmp_path / "prompts.txt"), "PROMPT or --file, not both", code=2)


@pytest.mark.parametrize("command", ["info", "show", "check", "lookup", "generate"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("flipped byte", "neurons.safetensors has the checksum .*expected"),
        ("flipped byte in the manifest", "manifest.json"),
        ("missing file", "lacks clusters.jsonl, expected"),
        ("missing manifest", "has no manifest.json, expected"),
        ("format version", "has format version 7, this release reads version 2"),
        ("no folder", "there is no folder .*expected an index"),
    ],
)
def test_a_damaged_index(damaged, command, damage, says):
    if damage.startswith("flipped"):
        path = damaged / ("manifest.json" if "manifest" in damage else "neurons.safetensors")
        content = bytearray(path.read_bytes())
        content[content.index(b'"alpha"') + 1 if "manifest" in damage else len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "format version":
        text = (damaged / "manifest.json").read_text(encoding="utf-8")
        (damaged / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 7'))
    elif damage == "no folder":
        shutil.rmtree(damaged)
    else:
        (damaged / ("clusters.jsonl" if damage == "missing file" else "manifest.json")).unlink()
    arguments = {"generate": ["generate", "stars", "--index", damaged], "lookup": ["lookup", damaged, "stars"]}
    refused(call(*arguments.get(command, [command, damaged])), says, "coreinfer-sim build-index")


@pytest.mark.parametrize("command", ["generate", "lookup"])
def test_an_argument_in_another_encoding(index, command):
    prompt = os.fsdecode("Was ist ein Gebäude?".encode("latin-1"))  # as Python passes what is no UTF-8
    refused(call(*(["generate", "--index", index] if command == "generate" else ["lookup", index]), prompt), "prompt")


def test_ctrl_c_in_every_command_ends_with_130(index, monkeypatch):
    def interrupt(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SemanticIndex, "load", interrupt)
    for command in (["info", index], ["check", index], ["lookup", index, "x"], ["generate", "x", "--index", index]):
        refused(call(*command), "interrupted", code=130)


def test_a_reader_that_goes_away_is_no_traceback(index):
    command = [*PROCESS, "info", str(index), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert run.returncode == 1
    assert run.stderr == ""
