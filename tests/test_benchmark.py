"""The benchmark measures what it says, contenders fail alone, and the command says so; times are never asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import count

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.bench import print_table
from coreinfer_sim_cli.main import main
from tiny_index import PROMPTS
from tiny_models import N_LAYERS, save_tiny_checkpoint, tiny_model, tiny_tokenizer

from coreinfer_sim.base.errors import ConfigError, GenerationError, PromptError
from coreinfer_sim.base.settings import BuildConfig, Mode
from coreinfer_sim.bench import bench as benchmark
from coreinfer_sim.bench.bench import Setup
from coreinfer_sim.bench.contenders import Subject
from coreinfer_sim.bench.machine import ReadBandwidth
from coreinfer_sim.bench.plot import plot_growth
from coreinfer_sim.bench.preparing import gguf_bytes, make_prompts
from coreinfer_sim.bench.prompts import cut_prompts
from coreinfer_sim.bench.shapes import SHAPES, byte_tokenizer, parse_shape, random_model
from coreinfer_sim.bench.specs import GGUF_TYPES, parse_spec, parse_specs
from coreinfer_sim.bench.worker import in_process
from coreinfer_sim.building.build import build_index
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, other_bytes

needs_llamacpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the extra llamacpp")
SHORT = ["--prompt-tokens", "12", "--new-tokens", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def small_bandwidth():
    """Read a small matrix, as times do not matter here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(benchmark, "ReadBandwidth", lambda **given: ReadBandwidth(n_bytes=1 << 22, **given))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("bench") / "model", intermediate_size=192)


@pytest.fixture(scope="module")
def index(checkpoint, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"prompt": f"{question} {number}"} for question in PROMPTS for number in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, config = str(folder / "prompts.jsonl"), BuildConfig(clusters=3)
    build_index(checkpoint, source, folder / "index", config, encoder=encoder, threads=1)
    return folder / "index"


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *(str(a) for a in arguments)])


def rows_of(result):
    assert result.exit_code == 0, result.output
    return {row["contender"]: row for row in json.loads(result.stdout)["contenders"]}


def test_contenders_are_read_from_text():
    assert (parse_spec("dense").kind, parse_spec("dense:f32").dtype) == ("dense", "float32")
    spec = parse_spec("sparse:0.5:bf16:int8:engine=lean:seed=2")
    assert (spec.mode, spec.ratio, spec.dtype, spec.needs_index) == (Mode.SIMILARITY, 0.5, "bfloat16", True)
    assert spec.options == {"weights": "int8", "engine": "lean", "seed": 2}
    assert (parse_spec("global").ratio, parse_spec("offload").ratio, parse_spec("offload:0.3").ratio) == (0.4, 0.5, 0.3)
    assert (parse_spec("ours-dense").mode, parse_spec("ours-dense:memory_budget=1kB").options) == (
        Mode.DENSE,
        {"memory_budget": 1000},
    )
    assert {parse_spec(f"llamacpp:{kind}").dtype for kind in GGUF_TYPES} == set(GGUF_TYPES)
    assert [spec.text for spec in parse_specs(["dense", " dense", "random:0.4"])] == ["dense", "random:0.4"]


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
        (["--shape", "llama-9"], 2, "expected one of gpt2, llama-3.1-8b"),
        (["--shape", "opt-6.7b:layers=33"], 2, "expected 1 to 32"),
        (["--shape", "opt-6.7b", "--contender", "sparse"], 1, "needs an index"),
        (["--shape", "opt-6.7b", "--prompt-tokens", "2040"], 1, "context is 2048"),
        (["--model", "./nowhere"], 1, "cannot be loaded"),
        (["--shape", "opt-6.7b", "--plot", "speed.pdf"], 1, "ends in .png or .svg"),
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


def test_bytes_per_token_by_hand():
    model = tiny_model("llama")
    layers = find_mlps(model)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # queries, keys and values of half as many heads, output
    norms = (2 * N_LAYERS + 1) * 32
    assert dense_bytes(layers) == 4 * N_LAYERS * 3 * 32 * 48
    assert other_bytes(model, layers) == 4 * (N_LAYERS * attention + norms + 80 * 32)  # the head, not the embeddings


def test_a_shared_head_counts_once_and_position_tables_never():
    shape = parse_shape("smollm2-135m:layers=1")
    loaded = random_model(shape, "bfloat16", "cpu")
    attention = 2 * 576 * 576 + 2 * 576 * 192
    assert other_bytes(loaded.model, loaded.layers) == 2 * (attention + 3 * 576 + 49152 * 576)
    opt = tiny_model("opt")
    layers = find_mlps(opt)
    tables = opt.model.decoder.embed_tokens.weight.numel() + opt.model.decoder.embed_positions.weight.numel()
    every = sum(p.numel() for p in opt.parameters())
    assert other_bytes(opt, layers) + dense_bytes(layers) == 4 * (every - tables)


def test_contenders_take_turns_in_one_run(checkpoint, index, tmp_path, capsys):
    result = run(
        "--model",
        checkpoint,
        "--index",
        index,
        *("--contender", "dense", "--contender", "global:0.5", "--contender", "random:0.5:float32"),
        *("--contender", "ours-dense", "--contender", "random:0.5:refresh=never"),
        *SHORT,
        "--json",
        *("--out", tmp_path / "speed.json", "--plot", tmp_path / "speed.svg"),
    )
    rows = rows_of(result)
    layers = load_model(checkpoint, "float32").layers
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["contender"] for row in found["contenders"]] == list(rows)
    assert {"machine", "versions", "date", "bandwidth_gb_per_s"} <= set(found)
    assert (found["prompt_tokens"], found["new_tokens"], found["rounds"], found["threads"]) == (12, 4, 2, 1)
    assert found["bandwidth_gb_per_s"]["lowest"] <= found["bandwidth_gb_per_s"]["median"]
    assert (tmp_path / "speed.svg").read_text().startswith("<?xml")
    print_table(found)
    assert "tokens/s" in (table := capsys.readouterr().out) and "refresh=never was not measured:" in table
    assert "refresh" in rows.pop("random:0.5:refresh=never")["error"]
    for name in ("dense", "global:0.5", "random:0.5:float32", "ours-dense"):
        row = rows[name]
        assert row["tokens_per_second_lowest"] <= row["tokens_per_second"] <= row["tokens_per_second_highest"]
        assert len(row["runs"]) == 2 and all(one["n_new"] == 4 for one in row["runs"])
        assert row["peak_bytes"] > 1e7 and row["first_token_seconds"] >= row["prefill_seconds"]
    dense = rows["dense"]["bytes_per_token"]
    assert rows["ours-dense"]["bytes_per_token"] == dense
    assert rows["global:0.5"]["bytes_per_token"] == dense - dense_bytes(layers) // 2


def test_when_all_fail_the_command_fails(checkpoint):
    result = run("--model", checkpoint, "--contender", "random:0.5:engine=warp", *SHORT)
    assert result.exit_code == 1 and "no contender could be measured" in result.stderr


@needs_llamacpp
def test_llama_cpp_runs_the_same_weights(checkpoint, tmp_path):
    contenders = ("--contender", "llamacpp:f32", "--contender", "dense:float32")
    rows = rows_of(run("--model", checkpoint, *contenders, *SHORT, "--folder", tmp_path / "files", "--json"))
    path = tmp_path / "files" / "dense-f32.gguf"
    assert gguf_bytes(path) == rows["llamacpp:f32"]["bytes_per_token"] == rows["dense:float32"]["bytes_per_token"]


def test_a_shape_needs_no_checkpoint():
    contenders = ["--contender", "random:0.25:bf16"]
    if importlib.util.find_spec("xllamacpp"):
        contenders += ["--contender", "llamacpp:bf16"]
    result = run("--shape", "smollm2-135m:layers=2", *contenders, *SHORT, "--fresh", "--json")
    found = json.loads(result.stdout)
    assert found["model"] == "smollm2-135m (2 of 30 layers, random weights)" and found["fresh"]
    for row in found["contenders"]:
        assert "error" not in row and len(row["runs"]) == 2


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_configurations(name):
    shape = parse_shape(f" {name}:layers=2")
    config = shape.config()
    assert config.num_hidden_layers == 2 and config.eos_token_id is None and name in shape.title


def test_offload_reads_layers_from_disk(checkpoint):
    rows = rows_of(run("--model", checkpoint, "--contender", "offload:0.9:float32", *SHORT, "--json"))
    assert int(rows["offload:0.9:float32"]["parts_on_disk"].split()[0]) > 0


def test_prompts_have_the_length_that_was_asked_for():
    for tokenizer in (tiny_tokenizer(), byte_tokenizer()):
        for text in (None, "One line.\n\nAnd another, which is longer."):
            prompts = cut_prompts(tokenizer, text, 50, 3)
            assert [len(tokenizer(prompt.text)["input_ids"]) for prompt in prompts] == [50, 50, 50]
            assert prompts[0].ids != prompts[1].ids
    drawn = make_prompts(Subject(None, parse_shape("smollm2-135m")), None, 33, 4, 2, seed=1)
    assert [len(prompt.ids) for prompt in drawn] == [33, 33] and drawn[0] != drawn[1]
    with pytest.raises(PromptError, match="is empty"):
        cut_prompts(tiny_tokenizer(), " \n ", 4, 1)


def test_a_process_that_dies_is_noticed():
    with pytest.raises(GenerationError, match="died with exit code 3"):
        in_process(_die, n_threads=1)
    with pytest.raises(GenerationError, match="ValueError: no"):
        in_process(_fail, n_threads=1)


def _die():
    import os

    os._exit(3)


def _fail():
    raise ValueError("no")


def test_a_setup_checks_itself():
    with pytest.raises(ConfigError, match="n_new is 1"):
        Setup(n_new=1)


def test_growth_is_drawn(tmp_path):
    numbers = count(1)
    lines = {name: [(2**n, float(next(numbers))) for n in range(3)] for name in ("ours", "dense")}
    plot_growth({"prompt tokens": lines, "rows": lines}, "tiny", tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().startswith("<?xml")
