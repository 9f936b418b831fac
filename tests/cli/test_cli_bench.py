"""`coreinfer-sim bench` measures what it says, contenders fail alone, and it says so; times are never asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.bench import print_table
from coreinfer_sim_cli.main import main

from coreinfer_sim.bench import bench as benchmark
from coreinfer_sim.bench.files import gguf_bytes
from coreinfer_sim.bench.machine import ReadBandwidth
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import dense_bytes

needs_llamacpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra llamacpp")
SHORT = ["--prompt-tokens", "12", "--new-tokens", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def small_bandwidth():
    """Read a small matrix, as times do not matter here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(benchmark, "ReadBandwidth", lambda **given: ReadBandwidth(n_bytes=1 << 22, **given))
    yield
    patch.undo()


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *(str(a) for a in arguments)])


def rows_of(result):
    assert result.exit_code == 0, result.output
    return {row["contender"]: row for row in json.loads(result.stdout)["contenders"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fast", "there is no 'fast'"),
        ("", "there is no ''"),
        ("dense:0.4", "dense contenders have no ratio"),
        ("dense:engine=lean", "'engine=lean' is unknown"),
        ("sparse:0.4:0.5", "a second time"),
        ("sparse:lots", "'lots' is unknown"),
        ("sparse:seed=two", "'two' is no seed"),
        ("sparse:speed=9", "'speed=9' is unknown"),
        ("ours-dense:memory_budget=1kB", "'memory_budget=1kB' is unknown"),
        ("llamacpp:q9", "llamacpp has no 'q9'"),
        ("random:1.5", "above 0 and at most 1"),
    ],
)
def test_bad_contenders_are_usage_errors(text, says):
    result = run("--model", "m", "--contender", text)
    assert result.exit_code == 2 and says in result.stderr
    if "at most 1" not in says:
        assert "offload[:SHARE]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "give --model or --shape"),
        (["--model", "m", "--shape", "opt-6.7b"], 2, "one of them"),
        (["--shape", "llama-9"], 2, "expected one of exaone-4.0-1.2b, gemma-3-1b"),
        (["--shape", "opt-6.7b:layers=33"], 2, "expected 1 to 32"),
        (["--shape", "opt-6.7b", "--contender", "sparse"], 1, "needs an index"),
        (["--shape", "opt-6.7b", "--prompt-tokens", "2040"], 1, "context is 2048"),
        (["--model", "./nowhere"], 1, "cannot be loaded"),
        (["--shape", "opt-6.7b", "--plot", "speed.pdf"], 1, "ends in .html, .png or .svg"),
    ],
)
def test_bad_settings_are_refused_before_any_work(arguments, code, says):
    result = run(*arguments)
    assert result.exit_code == code and says in result.stderr, result.output


def test_help_is_quick():
    code = (
        "import sys; from click.testing import CliRunner; from coreinfer_sim_cli.main import main\n"
        "assert CliRunner().invoke(main, ['bench', '--help']).exit_code == 0; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_contenders_take_turns_in_one_run(wide_checkpoint, wide_index, tmp_path, capsys):
    result = run(
        "--model",
        wide_checkpoint,
        "--index",
        wide_index.name,
        *("--contender", "dense", "--contender", "global:0.5"),
        *("--contender", "ours-dense", "--contender", "random:0.5:engine=warp"),
        *SHORT,
        "--json",
        *("--out", tmp_path / "speed.json", "--plot", tmp_path / "speed.svg"),
    )
    rows = rows_of(result)
    layers = load_model(wide_checkpoint, "float32").layers
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["contender"] for row in found["contenders"]] == list(rows)
    assert {"machine", "versions", "date", "bandwidth_gb_per_s"} <= set(found)
    assert (found["prompt_tokens"], found["new_tokens"], found["rounds"], found["threads"]) == (12, 4, 2, 1)
    assert found["bandwidth_gb_per_s"]["lowest"] <= found["bandwidth_gb_per_s"]["median"]
    assert (tmp_path / "speed.svg").read_text().startswith("<svg")
    print_table(found)
    assert "tokens/s" in (table := capsys.readouterr().out) and "engine=warp was not measured:" in table
    assert "warp" in rows.pop("random:0.5:engine=warp")["error"]
    for name in ("dense", "global:0.5", "ours-dense"):
        row = rows[name]
        assert row["tokens_per_second_lowest"] <= row["tokens_per_second"] <= row["tokens_per_second_highest"]
        assert len(row["runs"]) == 2 and all(one["n_new"] == 4 for one in row["runs"])
        assert row["peak_bytes"] > 1e7 and row["first_token_seconds"] >= row["prefill_seconds"]
    dense = rows["dense"]["bytes_per_token"]
    assert rows["ours-dense"]["bytes_per_token"] == dense
    assert rows["global:0.5"]["bytes_per_token"] == dense - dense_bytes(layers) // 2


def test_when_all_fail_the_command_fails(wide_checkpoint):
    result = run("--model", wide_checkpoint, "--contender", "random:0.5:engine=warp", *SHORT)
    assert result.exit_code == 1 and "no contender could be measured" in result.stderr


@needs_llamacpp
def test_llama_cpp_runs_the_same_weights(wide_checkpoint, tmp_path):
    contenders = ("--contender", "llamacpp:f32", "--contender", "dense:float32")
    rows = rows_of(run("--model", wide_checkpoint, *contenders, *SHORT, "--folder", tmp_path / "files", "--json"))
    path = tmp_path / "files" / "dense-f32.gguf"
    assert gguf_bytes(path) == rows["llamacpp:f32"]["bytes_per_token"] == rows["dense:float32"]["bytes_per_token"]


def test_a_shape_needs_no_checkpoint():
    contenders = ["--contender", "random:0.25:bf16"]
    if importlib.util.find_spec("xllamacpp"):
        contenders += ["--contender", "llamacpp:bf16"]
    result = run("--shape", "smollm2-135m:layers=2", *contenders, *SHORT, "--rounds", "1", "--fresh", "--json")
    found = json.loads(result.stdout)
    assert found["model"] == "smollm2-135m (2 of 30 layers, random weights)" and found["fresh"]
    for row in found["contenders"]:
        assert "error" not in row and len(row["runs"]) == 1


def test_offload_reads_layers_from_disk(wide_checkpoint):
    rows = rows_of(run("--model", wide_checkpoint, "--contender", "offload:0.9:float32", *SHORT, "--json"))
    assert int(rows["offload:0.9:float32"]["parts_on_disk"].split()[0]) > 0
