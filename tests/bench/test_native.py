"""llama.cpp's own program as a contender: what it prints is read, and a crash is its own."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main

from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.bench.native import LlamaBenchProgram, check_llama_bench
from coreinfer_sim.bench.programs import BenchJob, Prompt, Subject
from coreinfer_sim.bench.specs import parse_spec

REAL = shutil.which("llama-bench") or os.environ.get("LLAMA_BENCH")
PROMPT = Prompt("a b c d", [1, 2, 3, 4])

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs of these tests are shell scripts")


def script(path, lines):
    path.write_text("#!/bin/sh\n" + lines + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def program(path, file):
    job = BenchJob(
        parse_spec("llamacpp:q8_0"), Subject("model", None), 2, "cpu", 64, 0, file, None, 1000, llama_bench=path
    )
    made = LlamaBenchProgram(job)
    made.start()
    return made


def test_a_crash_is_told_with_its_signal(tmp_path):
    """The quantised prefill of one llama.cpp dies on processors with AMX."""
    path = script(tmp_path / "llama-bench", "kill -s ILL $$")
    with pytest.raises(GenerationError, match=r"crashed \(signal 4\) with -p 4 -n 0"):
        program(path, tmp_path / "llama-bench").run(PROMPT, 8)


def test_what_crashes_in_prefill_alone_is_measured_in_decode(tmp_path):
    """A batch kills this one, unless weights keep their layout; one token at a time, and decode, do not."""
    lines = (
        'case "$*" in *"--repack 0"*) echo \'[{"avg_ns": 4e9}]\';; *"--batch-size 1"*) echo \'[{"avg_ns": 2e9}]\';; '
        "*) kill -s ILL $$;; esac"
    )
    timed = program(script(tmp_path / "llama-bench", lines), tmp_path / "llama-bench")
    for _ in range(2):  # once told, it is not tried again
        timing = timed.run(PROMPT, 8)
        assert (timing.first_token_seconds, timing.tokens_per_second) == (4.0, 4.0)
        assert "crashed (signal 4) with -p 4 -n 0; it read the prompt with --repack 0" in timing.facts["crashed"]


def test_what_it_complains_of_is_told(tmp_path):
    path = script(tmp_path / "llama-bench", "echo 'error: failed to load model' >&2; exit 1")
    with pytest.raises(GenerationError, match="code 1, and said: error: failed to load model"):
        program(path, tmp_path / "llama-bench").run(PROMPT, 8)


def test_another_program_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not llama-bench"):
        check_llama_bench(script(tmp_path / "other", "echo hello"))
    plain = tmp_path / "plain"
    plain.write_text("no program")
    with pytest.raises(ConfigError, match="cannot be run"):
        check_llama_bench(plain)


def test_a_crash_of_one_contender_leaves_the_others(tiny_checkpoint, tmp_path):
    path = script(tmp_path / "llama-bench", 'case "$1" in --help) echo "--n-gen";; *) kill -s ILL $$;; esac')
    command = ["bench", "--model", tiny_checkpoint, "--contender", "ours-dense:float32", "--contender", "llamacpp:f32"]
    sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--threads", "1"]
    done = CliRunner().invoke(main, [*command, *sizes, "--llama-bench", str(path)])
    assert done.exit_code == 0, done.output
    assert "llamacpp:f32" in done.output and "was not measured: llama-bench crashed (signal 4)" in done.output
    assert "ours-dense:float32" in done.output


def test_the_file_itself_needs_to_be_one(tiny_checkpoint, tmp_path):
    command = ["bench", "--model", tiny_checkpoint, "--contender", "llamacpp:file", "--rounds", "1"]
    done = CliRunner().invoke(main, [*command, "--prompt-tokens", "8", "--new-tokens", "2"])
    assert done.exit_code == 1 and "runs the GGUF file that the model is" in done.output + done.stderr


def test_the_quantiser_beside_it_makes_the_files(tiny_checkpoint, tmp_path):
    """llama.cpp's own one chooses types as its users have them; it gets the 16-bit file, once."""
    bench = script(
        tmp_path / "llama-bench", """case "$1" in --help) echo "--n-gen";; *) echo '[{"avg_ns": 1e9}]';; esac"""
    )
    script(tmp_path / "llama-quantize", 'echo "$3" >> "$(dirname "$0")/asked"; cp "$1" "$2"')
    sizes = ["--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--threads", "1", "--llama-bench", bench]
    given = [
        "bench",
        "--model",
        tiny_checkpoint,
        "--contender",
        "llamacpp:q4_0",
        "--folder",
        tmp_path / "files",
        *sizes,
    ]
    for _ in range(2):
        done = CliRunner().invoke(main, [str(word) for word in given])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "asked").read_text() == "Q4_0\n"
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["dense-bf16.gguf", "quantised-q4_0.gguf"]


@pytest.mark.skipif(REAL is None, reason="llama-bench is not installed, and LLAMA_BENCH does not name it")
def test_the_program_itself(exported):
    timing = program(check_llama_bench(Path(REAL)), exported / "dense.gguf").run(PROMPT, 8)
    assert timing.n_new == 8 and timing.tokens_per_second > 0 and timing.prefill_seconds > 0
