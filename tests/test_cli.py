"""The commands: what they print, where, and how they end, for good input and for bad."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from coreinfer_sim_cli.main import main
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import load_model

COMMANDS = ["build-index", "info", "verify", "lookup", "generate", "evaluate"]
MODES = ["similarity", "hybrid", "stability", "global", "random", "dense"]
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [
        {"prompt": f"What do {noun} tell us about {topic}, case {n}?", "completion": f"All of {noun} {n}."}
        for n in range(3)
        for topic, nouns in TOPICS.items()
        for noun in nouns
    ]
    return write_rows(tmp_path_factory.mktemp("corpus") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def built(corpus, tiny_checkpoint, tmp_path_factory) -> tuple[Path, Result]:
    """An index and what the command said that built it."""
    out = tmp_path_factory.mktemp("built") / "index"
    return out, succeeded(
        "build-index", corpus, "--model", tiny_checkpoint, "--out", out, "--clusters", 3, "--gamma", 0.5, *ONE_PROCESS
    )


@pytest.fixture(scope="module")
def index(built) -> Path:
    """An index; read-only."""
    return built[0]


@pytest.fixture
def damaged(index, tmp_path) -> Path:
    """A copy of the index, to be damaged."""
    return shutil.copytree(index, tmp_path / "damaged")


@pytest.fixture
def build(corpus, tiny_checkpoint, tmp_path):
    """Run build-index into a new folder with other arguments."""

    def run(*more: Any, source: Any = corpus, out: Any = tmp_path / "out" / "index") -> Result:
        return call("build-index", source, "--model", tiny_checkpoint, "--out", out, *ONE_PROCESS, *more)

    return run


# Help


def test_help_does_not_import_torch():
    script = shutil.which("coreinfer-sim", path=str(Path(sys.executable).parent)) or shutil.which("coreinfer-sim")
    assert script, "the command is not installed; run 'pip install -e .'"
    run = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("Usage: coreinfer-sim [OPTIONS] COMMAND")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", run.stdout, re.MULTILINE)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "coreinfer_sim_cli" in imported and "click" in imported
    assert not imported & {"torch", "transformers", "datasets", "faiss", "numba", "numpy", "sentence_transformers"}
    assert not imported & {"lm_eval", "matplotlib", "rouge_score", "sacrebleu"}


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
    assert f"{command} [OPTIONS]" in result.stdout and "--json" in result.stdout
    assert result.stderr == ""


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert succeeded("--version").stdout.strip() == f"coreinfer-sim, version {version('coreinfer-sim')}"


# build-index


def test_a_build_says_what_it_read_and_what_it_will_take(built, tiny_checkpoint):
    out, run = built
    assert re.search(r"^Corpus: 45 prompts with [\d,]+ tokens kept of 45 rows\.$", run.stderr, re.MULTILINE)
    assert re.search(
        r"^Plan: 45 prompts, .* 3 clusters, 1 shard; disk .*; memory about .*\.$", run.stderr, re.MULTILINE
    )
    assert len(run.stderr.splitlines()) == 2  # no bars where there is no terminal
    assert run.stdout.startswith(f"{out}: 3 clusters over 45 prompts\n")
    for topic in TOPICS:
        assert re.search(rf"^ +\d +15 prompts  .*{topic}", run.stdout, re.MULTILINE)


def test_build_as_json(build, tmp_path):
    run = build("--clusters", 2, "--json", "--quiet")
    assert run.exit_code == 0 and run.stderr == ""
    found = json.loads(run.stdout)
    assert found["index"] == str(tmp_path / "out" / "index")
    assert found["settings"]["n_clusters"] == len(found["clusters"]) == 2
    assert sum(cluster["size"] for cluster in found["clusters"]) == found["corpus"]["n_sentences"] == 45


def test_every_setting_of_a_build_arrives(build, corpus, tmp_path):
    options = {"--alpha": 0.3, "--beta": 0.2, "--gamma": 0.6, "--seed": 5, "--batch-size": 3, "--shard-size": 7}
    run = build(
        *(part for option in options.items() for part in option),
        *("--clusters", 2, "--layers", "1:", "--limit", 20, "--max-tokens", 9, "--dtype", "bfloat16", "--threads", 2),
        *("--prompt-column", "completion", "--template", "{prompt}\\n{completion}", "--json"),
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["settings"] == {
        **{"n_clusters": 2, "alpha": 0.3, "beta": 0.2, "gamma": 0.6, "seed": 5, "layers": [1, 2]},
        **{"batch_size": 3, "shard_size": 7, "n_threads": 2},
    }
    assert found["corpus"]["n_sentences"] == 20 and found["corpus"]["n_tokens"] == 20 * 9
    assert found["model"]["dtype"] == "bfloat16"
    assert found["clusters"][0]["exemplars"][0].startswith("All of")
    assert re.search(r"20 texts cut, [\d,]+ tokens lost", run.stderr)


def test_auto_shows_the_curve_and_what_was_chosen(build):
    run = build("--json")
    assert run.exit_code == 0, run.output
    assert re.findall(r"^ +(\d+) clusters: silhouette 0\.\d{4} ▇+$", run.stderr, re.MULTILINE) == ["2", "3", "4"]
    assert "Chosen: 3 clusters." in run.stderr
    assert len(json.loads(run.stdout)["clusters"]) == 3


def test_duplicates_are_kept_where_asked_for(build, tmp_path):
    source = write_rows(tmp_path / "twice.jsonl", [{"prompt": "stars"}, {"prompt": "bread"}, {"prompt": "stars"}])
    kept = build("--clusters", 2, "--keep-duplicates", "--json", source=source)
    assert json.loads(kept.stdout)["corpus"]["n_sentences"] == 3
    dropped = build("--clusters", 2, "--json", "--force", source=source)
    assert json.loads(dropped.stdout)["corpus"]["n_sentences"] == 2 and "1 duplicate dropped" in dropped.stderr


# info, verify, lookup


def test_info(index, tiny_checkpoint):
    text = succeeded("info", index).stdout
    assert text.startswith(f"{index}: format version 2\n")
    assert f"{tiny_checkpoint} (Llama, 3 layers, d_model 32, d_ff 48, float32)" in text
    assert "all-MiniLM-L6-v2 (384 dimensions, cosine)" in text
    assert "prompts.jsonl: 45 prompts" in text and "γ 0.5, seed 0, layers 0-2" in text
    assert "3 clusters:" in text
    found = parsed("info", index)
    loaded = SemanticIndex.load(index)
    for name in ("format_version", "versions", "encoder", "corpus", "settings", "files"):
        expected = loaded.manifest.as_dict()[name]
        assert found[name] == {k: v for k, v in expected.items() if k != "probe"} if name == "encoder" else expected
    assert found["index"] == str(index) and found["model"]["d_ff"] == 48
    assert [cluster["label"] for cluster in found["clusters"]] == [cluster.label for cluster in loaded.clusters]
    assert [cluster["size"] for cluster in found["clusters"]] == [15, 15, 15]


def test_verify(index, tiny_checkpoint):
    assert re.match(rf"{index} is valid: format version, .*checksums, encoder\n", succeeded("verify", index).stdout)
    found = parsed("verify", index, "--model", tiny_checkpoint)
    assert found["index"] == str(index) and found["valid"] is True
    assert {"checksums", "encoder", "sampled model weights", "tokenizer"} <= set(found["checked"])


def test_lookup(index):
    text = succeeded("lookup", index, "Where do comets come from?", "-k", 2).stdout
    first, second, *rest = text.splitlines()
    assert re.match(r" +0\.\d{3}  cluster +\d  .*space", first) and "space" not in second
    assert re.match(r"core neurons of cluster \d: 24 of 48 in each of 3 layers", rest[0])
    assert len(rest) == 4


def test_lookup_as_json(index):
    found = parsed("lookup", index, "Where do comets come from?", "--keep-ratio", 0.25, "--layers", "1:", "-k", 99)
    assert found["prompt"] == "Where do comets come from?"
    assert len(found["matches"]) == 3  # no more than there are
    similarities = [match["similarity"] for match in found["matches"]]
    assert similarities == sorted(similarities, reverse=True)
    assert "space" in found["matches"][0]["label"]
    assert set(found["core_neurons"]) == {"1", "2"}
    loaded = SemanticIndex.load(index)
    best = found["matches"][0]["cluster"]
    for layer, ids in loaded.core_neurons(best, 0.25, layers="1:").items():
        assert len(ids) == 12 and found["core_neurons"][str(layer)] == ids.tolist()
    paper = parsed("lookup", index, "comets", "--keep-ratio", 0.25, "--score", "paper")["core_neurons"]
    assert paper["1"] == loaded.core_neurons(best, 0.25, "paper")[1].tolist() != found["core_neurons"]["1"]


def test_lookup_says_whether_a_prompt_is_familiar(index):
    for prompt, familiar in ((f"What do {NOUNS[0]} tell us about space, case 0?", True), ("zzz qqq 0x3f", False)):
        best = parsed("lookup", index, prompt)["matches"][0]
        assert best["confident"] is familiar and (best["confidence"] >= 0.05) is familiar
        assert succeeded("lookup", index, prompt).stdout.splitlines()[0].endswith("(unfamiliar)") is not familiar


def test_lookup_shows_all_ids_where_asked_to(index):
    short, full = (succeeded("lookup", index, "comets", *more).stdout for more in ([], ["--ids"]))
    ids = parsed("lookup", index, "comets")["core_neurons"]["2"]
    assert len(ids) == 24
    assert f"layer   2: {', '.join(map(str, ids))}\n" in full
    assert f"layer   2: {', '.join(map(str, ids[:12]))}, …\n" in short


def test_an_index_over_some_layers_can_be_looked_into(build, tmp_path):
    assert build("--clusters", 2, "--layers", "1:2").exit_code == 0
    out = tmp_path / "out" / "index"
    assert set(parsed("lookup", out, "comets")["core_neurons"]) == {"1"}
    assert "layers 1\n" in succeeded("info", out).stdout
    refused(call("lookup", out, "comets", "--layers", "0:2"), r"layers \[0\] were not recorded")
    for mode in ("similarity", "global", "hybrid", "stability", "random"):  # two of three layers are dense
        found = generated(out, "--keep-ratio", 0.5, "--mode", mode, "--max-new-tokens", 2)
        assert found["keep_ratio"] == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-3)


# generate


def generated(index: Path, *more: Any, prompt: str = "How do stars form?") -> Any:
    """Generate eight tokens and return what --json prints."""
    return parsed("generate", prompt, "--index", index, "--max-new-tokens", 8, *more)


FIELDS = {
    *("prompt", "text", "mode", "cluster", "label", "similarity", "keep_ratio", "n_prompt_tokens", "n_new_tokens"),
    *(
        "engine",
        "lookup_seconds",
        "swap_seconds",
        "prefill_seconds",
        "decode_seconds",
        "tokens_per_second",
        "mlp_bytes_per_token",
        "dense_mlp_bytes_per_token",
    ),
    *("confidence", "confident", "n_refreshes"),
}


@pytest.fixture(scope="module")
def dense_text(tiny_checkpoint) -> str:
    """What transformers' own greedy generate gives."""
    loaded = load_model(tiny_checkpoint)
    ids = loaded.tokenizer("How do stars form?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = loaded.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_options_that_a_mode_does_not_look_at_are_named(index):
    options = ("generate", "stars", "--index", index, "--max-new-tokens", 2)
    done = succeeded(*options, "--mode", "dense", "--score", "paper", "--keep-ratio", 0.4)
    for name in ("--score", "--keep-ratio"):
        assert f"Note: {name} has no effect in mode dense.\n" in done.stderr
    assert "Note" not in succeeded(*options, "--fallback", "none").stderr


@pytest.mark.parametrize("mode", MODES)
def test_generate_in_every_mode(index, mode):
    found = generated(index, "--mode", mode, "--fallback", "none")
    assert set(found) == FIELDS
    assert found["mode"] == mode and found["n_new_tokens"] == 8 and found["prompt"] == "How do stars form?"
    assert found["keep_ratio"] == (1.0 if mode == "dense" else 0.5)  # else the γ of the index
    routed = mode in ("similarity", "hybrid")
    assert [found[name] is not None for name in ("cluster", "confidence", "confident")] == [routed] * 3
    if routed:
        assert "space" in found["label"] and 0 < found["similarity"] <= 1 and 0 <= found["confidence"] <= 1
    assert found["dense_mlp_bytes_per_token"] == 3 * 3 * 32 * 48 * 4
    assert found["mlp_bytes_per_token"] == found["dense_mlp_bytes_per_token"] * found["keep_ratio"]

    text = succeeded(
        *("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, "--mode", mode),
        *(("--fallback", "none") if mode == "similarity" else ()),
    )
    assert text.stdout == f"> How do stars form?\n{found['text']}\n"
    assert re.match(rf"  {mode} · .*keeps {found['keep_ratio']:.2f} · 8 tokens at [\d.]+ tokens/s · reads", text.stderr)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_at_keep_ratio_1(index, mode, dense_text):
    assert generated(index, "--mode", mode, "--keep-ratio", 1.0)["text"] == dense_text


def test_keep_ratio_score_and_layers_change_what_is_kept(index, dense_text):
    assert generated(index, "--keep-ratio", 0.25)["keep_ratio"] == 0.25
    assert generated(index, "--keep-ratio", 0.25, "--layers", "1:")["keep_ratio"] == 0.5
    texts = {
        generated(index, "--keep-ratio", 0.2, *more)["text"] for more in ([], ["--score", "paper"], ["--layers", "2"])
    }
    assert len(texts | {dense_text}) == 4


@pytest.mark.parametrize("fallback", [None, "hybrid", "dense", "global", "none"])
def test_what_an_unfamiliar_prompt_gets(index, fallback):
    options = [] if fallback is None else ["--fallback", fallback]
    found = generated(index, *options, prompt="zzz qqq 0x3f")
    mode = {None: "hybrid", "none": "similarity"}.get(fallback, fallback)
    assert (found["mode"], found["confident"]) == (mode, False) and found["confidence"] < 0.05
    assert found["cluster"] is not None
    other = generated(index, "--mode", mode, "--fallback", "none", prompt="zzz qqq 0x3f")
    assert found["text"] == other["text"] and found["keep_ratio"] == other["keep_ratio"]
    text = succeeded("generate", "zzz qqq 0x3f", "--index", index, "--max-new-tokens", 2, *options).stderr
    assert re.match(rf"  {mode} · cluster .* · unfamiliar prompt · ", text)
    familiar = generated(index, *options, prompt=f"What do {NOUNS[0]} tell us about space, case 0?")
    assert (familiar["mode"], familiar["confident"]) == ("similarity", True)


def test_refresh(index):
    found = generated(index, "--mode", "hybrid", "--keep-ratio", 0.3, "--refresh", "every:3")
    assert (found["n_refreshes"], found["n_new_tokens"]) == (2, 8)
    sparse, dense = generated(index, "--mode", "stability", "--refresh", "drift", "--compare")
    assert sparse["n_refreshes"] == dense["n_refreshes"] == 0  # too few tokens
    text = succeeded("generate", "stars", "--index", index, "--mode", "stability", "--refresh", "every:1").stderr
    assert re.search(r"keeps 0\.50, \d+ times? anew · ", text)
    refused(call("generate", "stars", "--index", index, "--refresh", "drift"), "mode similarity", "stability or hybrid")
    refused(call("generate", "stars", "--index", index, "--mode", "hybrid", "--refresh", "often"), "every:N")
    beams = call("generate", "stars", "--index", index, "--mode", "hybrid", "--refresh", "drift", "--num-beams", 2)
    refused(beams, "--num-beams is 2", "expected 1", code=2)
    assert not beams.stdout, "nothing is printed before the refusal"


def test_modes_without_an_index(tiny_checkpoint):
    for mode in ("stability", "random", "dense"):
        found = parsed(
            "generate", "stars", "--model", tiny_checkpoint, "--mode", mode, "--keep-ratio", 0.5, "--max-new-tokens", 2
        )
        assert found["mode"] == mode
    for mode in ("similarity", "hybrid", "global"):
        refused(
            call("generate", "stars", "--model", tiny_checkpoint, "--mode", mode, "--keep-ratio", 0.5),
            "needs an index",
            "build-index",
        )
    refused(call("generate", "stars", "--model", tiny_checkpoint, "--mode", "random"), "no keep ratio")


def test_compare_decodes_densely_too(index, dense_text):
    sparse, dense = generated(index, "--compare")
    assert sparse == {**generated(index), **{name: sparse[name] for name in sparse if "second" in name}}
    assert (dense["mode"], dense["text"], dense["cluster"]) == ("dense", dense_text, None)
    text = succeeded("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, "--compare")
    assert re.search(rf"^> How do stars form\?\n\[similarity\]\n.*\n  {sparse['mode']} · ", text.stdout)
    assert f"\n[dense]\n{dense_text}\n  dense · keeps 1.00 · 8 tokens" in text.stdout
    assert text.stderr == ""
    assert (
        len(succeeded("generate", "x", "--index", index, "--compare", "--mode", "dense").stdout.split("[dense]")) == 2
    )


@pytest.mark.parametrize("source", ["file", "stdin"])
@pytest.mark.parametrize("compare", [False, True])
def test_lines_are_prompts(index, tmp_path, source, compare):
    lines = "How do stars form?\n\n  Why does bread rise?  \r\nWas ist ein Gebäude?"
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    where = {"file": (["--file", tmp_path / "prompts.txt"], ""), "stdin": ([], lines)}[source]
    arguments = [
        "generate",
        "--index",
        index,
        "--fallback",
        "none",
        "--max-new-tokens",
        4,
        *where[0],
        *(["--compare"] if compare else []),
    ]
    rows = parsed(*arguments, stdin=where[1])
    prompts = ["How do stars form?", "Why does bread rise?", "Was ist ein Gebäude?"]
    assert [(row[0] if compare else row)["prompt"] for row in rows] == prompts
    assert all([run["mode"] for run in row] == ["similarity", "dense"] for row in rows) if compare else True
    text = succeeded(*arguments, stdin=where[1]).stdout
    assert [line[2:] for line in text.splitlines() if line.startswith("> ")] == prompts


def test_one_line_in_a_file_is_still_a_list(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("stars\n", encoding="utf-8")
    (row,) = parsed("generate", "--index", index, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 2)
    assert row["prompt"] == "stars"


def test_a_line_that_fails_does_not_take_the_others_along(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("stars\n" + "stars " * 2000 + "\nbread\n", encoding="utf-8")
    result = call("generate", "--index", index, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 2, "--json")
    assert result.exit_code == 1
    assert [row["prompt"] for row in json.loads(result.stdout)] == ["stars", "bread"]
    first, last = result.stderr.splitlines()
    assert first.startswith("Error: line 2: the prompt has ") and last.startswith("Error: 1 of 3 prompts failed")


def test_sampling_repeats_with_its_seed(index):
    drawn = [generated(index, "--temperature", 2.0, "--seed", seed)["text"] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert generated(index, "--seed", 1)["text"] == generated(index, "--seed", 2)["text"]  # greedy


@pytest.mark.parametrize("option", [["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1.0]], ids=str)
def test_sampling_among_one_token_is_greedy(index, option):
    assert generated(index, *option, "--seed", 3)["text"] == generated(index)["text"]


@pytest.mark.parametrize(
    "options",
    [
        ["--typical-p", 0.5],
        ["--top-p", 0.9, "--top-k", 5, "--min-p", 0.05, "--temperature", 0.7],
        ["--num-beams", 3],
        ["--num-beams", 2, "--temperature", 1.5],
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["similarity", "stability"])
def test_sampling_and_beams(index, options, mode):
    found = generated(index, "--mode", mode, *options)
    assert found["n_new_tokens"] == 8 and found["text"]
    assert found == {**generated(index, "--mode", mode, *options), **{k: v for k, v in found.items() if "second" in k}}


def test_beams_show_their_text_at_the_end(index):
    found = generated(index, "--num-beams", 3)
    text = succeeded("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, "--num-beams", 3)
    assert text.stdout == f"> How do stars form?\n{found['text']}\n"


def test_penalties_and_stops(index):
    plain = generated(index, "--max-new-tokens", 40)["text"]
    assert generated(index, "--max-new-tokens", 40, "--repetition-penalty", 5.0)["text"] != plain
    free = generated(index, "--max-new-tokens", 40, "--no-repeat-ngram-size", 1)["text"]
    assert free != plain
    stopped = generated(index, "--max-new-tokens", 40, "--stop", plain[3:5])
    assert stopped["n_new_tokens"] < 40 and plain.startswith(stopped["text"])
    assert generated(index, "--max-new-tokens", 5, "--min-new-tokens", 5)["n_new_tokens"] == 5


def test_chat_uses_the_models_template(index):
    plain, chat = generated(index), generated(index, "--chat")
    system = generated(index, "--chat", "--system", "Answer briefly.")
    assert plain["n_prompt_tokens"] < chat["n_prompt_tokens"] < system["n_prompt_tokens"]
    assert plain["text"] != chat["text"]
    assert chat["prompt"] == "How do stars form?"  # routed by what the user said, not by the template
    assert chat["similarity"] == system["similarity"] == plain["similarity"]


def test_a_model_without_a_template_does_not_chat(index, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    (copy / "chat_template.jinja").unlink()
    refused(
        call("generate", "stars", "--index", index, "--model", copy, "--chat"), "has no chat template", "plain text"
    )


# Usage errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["build-index"],
        ["build-index", "corpus.jsonl", "--out", "x"],
        ["build-index", "corpus.jsonl", "--model", "m"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--clusters", "many"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--clusters", "²"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--limit", "0"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--workers", "0"],
        ["build-index", "corpus.jsonl", "--model", "m", "--out", "x", "--dtype", "int3"],
        ["info"],
        ["lookup", "index"],
        ["lookup", "index", "prompt", "-k", "0"],
        ["lookup", "index", "prompt", "--score", "best"],
        ["generate", "prompt", "--mode", "oracle"],
        ["generate", "prompt", "--temperature", "0"],
        ["generate", "prompt", "--top-p", "1.5"],
        ["generate", "prompt", "--max-new-tokens", "0"],
        ["generate", "--file", "/nowhere/prompts.txt"],
        ["generate", "prompt", "--sparsity", "0.4"],
    ],
    ids=" ".join,
)
def test_usage_errors_end_with_2(arguments):
    refused(call(*arguments), code=2)


def test_a_prompt_and_a_file_are_too_much(tmp_path):
    (tmp_path / "prompts.txt").touch()
    refused(call("generate", "prompt", "--file", tmp_path / "prompts.txt"), "PROMPT or --file, not both", code=2)


# Bad input


def test_an_empty_corpus(build, tmp_path):
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", '{"prompt": " "}\n')):
        (tmp_path / name).write_text(content)
        refused(
            build(source=tmp_path / name),
            f"{name} (is empty|holds no usable text)",
            "expected at least one row",
            "check the file",
        )
    nothing_loads(tmp_path)


def test_a_missing_corpus(build, tmp_path):
    refused(
        build(source="/nowhere/corpus.jsonl"),
        "there is no file /nowhere/corpus.jsonl",
        "expected a corpus",
        "check the path",
    )
    nothing_loads(tmp_path)


@pytest.mark.parametrize("option", ["--prompt-column=question", "--template={question}"])
def test_a_missing_column(build, tmp_path, option):
    refused(build(option), r"\['completion', 'prompt'\]", "expected question", "--prompt-column")
    nothing_loads(tmp_path)


def test_a_broken_corpus(build, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "stars"}\n{"prompt": "bread\n')
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("datasets").addHandler(handler)
    try:
        refused(build(source=tmp_path / "broken.jsonl"), "broken.jsonl cannot be read", "expected a hub id")
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert [record.getMessage() for record in logged] == []  # nothing beside the one line
    nothing_loads(tmp_path)


def test_more_clusters_than_prompts(build, tmp_path):
    refused(build("--clusters", 46), "46 clusters", "45 prompts", "smaller --clusters")
    nothing_loads(tmp_path)
    assert not (tmp_path / "out" / "index").exists()


def test_an_output_folder_that_exists(build, index, tmp_path):
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    refused(build(out=index), "exists already", "expected a new folder", "--force")
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before
    (tmp_path / "file").write_text("dear")
    refused(build(out=tmp_path / "file", source="/nowhere"), "exists already and is no index")
    refused(build("--force", out=tmp_path / "file"), "is no index")
    assert (tmp_path / "file").read_text() == "dear"


def test_other_settings_than_those_of_a_broken_off_build(build, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    refused(build("--clusters", 46), "46 clusters")  # leaves nothing
    with monkeypatch.context() as patch:
        patch.setattr("coreinfer_sim.building.build._Build.run", interrupt)
        assert build("--clusters", 2).exit_code != 0
    refused(
        build("--clusters", 3, "--alpha", 0.7),
        r"clusters \(2 there, 3 here\), alpha \(0.4 there, 0.7 here\)",
        "expected the same",
        "--force",
    )
    assert build("--clusters", 3, "--force").exit_code == 0


def test_a_model_that_is_not_there(build, index, tmp_path):
    refused(
        call("generate", "stars", "--index", index, "--model", "/nowhere/model"), "/nowhere/model", "check the path"
    )
    refused(call("generate", "stars", "--index", index, "--model", "/nowhere/model.gguf"), "no file", "check the path")
    (tmp_path / "empty").mkdir()
    refused(
        call("generate", "stars", "--index", index, "--model", tmp_path / "empty"), "no config.json", "check the path"
    )
    refused(call("generate", "stars"), "neither a model nor an index", "--model")


def test_weights_that_are_no_weights(index, tiny_checkpoint, tmp_path):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    refused(call("generate", "stars", "--index", index, "--model", broken), "cannot be loaded", "expected a hub id")


def test_another_model_of_the_same_family(index, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    for command in (["generate", "stars", "--index", index], ["verify", index]):
        refused(
            call(*command, "--model", other), r"\d+ of 96 sampled weights", "expected the same weights", "build-index"
        )


def test_another_shape_of_the_same_family(index, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", num_hidden_layers=2)
    for command in (["generate", "stars", "--index", index], ["verify", index]):
        refused(call(*command, "--model", other), "Llama with 2 layers", "Llama with 3 layers", "build-index")


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_the_same_model_with_another_tokenizer(index, tiny_checkpoint, tmp_path, command):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    one, two = (token for token, number in vocabulary.items() if number in (350, 360))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    arguments = ["verify", index] if command == "verify" else ["generate", "stars", "--index", index]
    refused(call(*arguments, "--model", other), "tokenizer")


@pytest.mark.parametrize("command", ["info", "verify", "lookup", "generate"])
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


def test_a_prompt_longer_than_the_models_context(index):
    result = call("generate", "stars " * 1000, "--index", index, "--max-new-tokens", 10)
    line = refused(result, r"the prompt has \d+ tokens and 10 new ones", "context is 1024", "shorten the prompt")
    assert int(re.search(r"has (\d+) tokens", line)[1]) > 1024
    refused(call("generate", "stars", "--index", index, "--max-new-tokens", 1024), r"at most 10\d\d\.$")


@pytest.fixture
def stores(tmp_path, monkeypatch) -> Path:
    """Where this test's neuron-major stores go."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


MORE_OR_LESS = ("lookup_seconds", "swap_seconds", "prefill_seconds", "decode_seconds", "tokens_per_second")


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "similarity"],
        ["--mode", "similarity", "--prefill", "sparse"],
        ["--mode", "hybrid", "--refresh", "every:4"],
        ["--mode", "global", "--layers", "1:"],
        ["--mode", "random", "--prefill", "sparse", "--chat", "--num-beams", "2"],
        ["--mode", "dense", "--prefill", "sparse"],
    ],
    ids=" ".join,
)
def test_generate_gives_the_same_under_a_memory_budget(index, stores, options):
    plain = generated(index, *options)
    budgeted = generated(index, *options, "--memory-budget", "64GiB")
    (store,) = stores.iterdir()
    assert store.suffix == ".neurons"
    for name in MORE_OR_LESS:
        del plain[name], budgeted[name]
    assert budgeted == plain


def test_a_memory_budget_says_what_it_plans(index, stores):
    done = succeeded(
        *("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, "--compare"),
        *("--memory-budget", "64GiB"),
    )
    assert re.search(r"^Memory budget 64.0 GiB, planned .*kept neurons [\d.]+ KiB", done.stderr, re.MULTILINE)
    assert re.search(r"^Writing the model's MLPs neuron by neuron to .*: [\d.]+ KiB, once", done.stderr, re.MULTILINE)
    assert len(done.stdout.splitlines()) == 7 or "[dense]" in done.stdout


def test_an_impossible_memory_budget_is_refused_before_loading(index, stores):
    line = refused(
        call("generate", "stars", "--index", index, "--memory-budget", "10MiB"), r"budget is 10\.0 MiB, but this needs"
    )
    assert not stores.exists()
    assert int(re.search(r"give at least --memory-budget (\d+)MiB", line)[1]) > 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory-budget", "64GiB", "--dtype", "bfloat16"], "leave --dtype out"),
        (["--memory-budget", "64GiB", "--weights", "int8"], "for which a memory budget has no plan"),
        pytest.param(
            ["--memory-budget", "64GiB", "--device", "cuda"],
            "no GPU that this torch can use",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--memory-budget", "much"], "is no size"),
        (["--prefill", "sparse", "--mode", "stability"], "sparse prefill needs the set before"),
        (["--prefill", "sparse", "--fallback", "hybrid"], "sparse prefill needs the set before"),
    ],
    ids=str,
)
def test_budgets_and_prefills_that_cannot_be_met(index, stores, options, says):
    refused(call("generate", "stars", "--index", index, *options), says)


def test_a_budget_for_llama_cpp(index):
    result = call("generate", "stars", "--index", index, "--backend", "llamacpp", "--memory-budget", "2GiB")
    assert result.exit_code == 2 and "--memory-budget does not apply to --backend llamacpp" in result.stderr


def test_a_damaged_store_is_one_line(index, stores):
    command = ["generate", "stars", "--index", index, "--max-new-tokens", 2, "--memory-budget", "64GiB"]
    succeeded(*command)
    (store,) = stores.iterdir()
    store.write_bytes(store.read_bytes()[:-9])
    refused(call(*command), r"bytes, expected .*; delete it")
    store.unlink()
    succeeded(*command)


def test_no_prompt(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    refused(call("generate", "--index", index, stdin=""), "no prompt was given", "--file")
    refused(call("generate", "--index", index, "--file", tmp_path / "prompts.txt"), "no prompt was given")
    refused(call("generate", " ", "--index", index), "the prompt is empty, expected some text")
    refused(call("lookup", index, " "), "the prompt is empty, expected some text")


def test_a_system_message_without_chat(index):
    refused(call("generate", "stars", "--index", index, "--system", "Be brief."), "--system was given without --chat")


BAD_GENERATE = [
    ["--keep-ratio", "0"],
    ["--keep-ratio", "1.5"],
    ["--layers", "x"],
    ["--layers", "::0"],
    ["--layers", "9:"],
    ["--device", "no-such-device"],
    ["--encoder", "/nowhere/encoder"],
    ["--temperature", "nan"],
    ["--stop", ""],
    ["--min-new-tokens", "9", "--max-new-tokens", "8"],
    ["--seed", str(2**70), "--mode", "random"],
    pytest.param(["--device", "cuda"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
]


@pytest.mark.parametrize("options", BAD_GENERATE, ids=" ".join)
def test_settings_of_generate_that_cannot_be_met(index, options):
    result = call("generate", "stars", "--index", index, *options)
    refused(result, code=2 if result.exit_code == 2 else 1)


@pytest.mark.parametrize("options", [["--layers", "9:"], ["--layers", "::0"], ["--keep-ratio", "7"]], ids=" ".join)
def test_settings_of_lookup_that_cannot_be_met(index, options):
    refused(call("lookup", index, "stars", *options), "layers|keep ratio")


@pytest.mark.parametrize(
    "options",
    [
        ["--alpha", "2"],
        ["--beta", "0"],
        ["--gamma", "-1"],
        ["--clusters", "0"],
        ["--layers", "::0"],
        ["--layers", "7"],
        ["--seed", str(2**31 - 1), "--clusters", "2"],
        ["--template", "no column"],
        ["--template", "{prompt:d}"],
        ["--max-tokens", "2000"],
        ["--encoder", "/nowhere/encoder"],
        pytest.param(
            ["--device", "cuda"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
    ids=" ".join,
)
def test_settings_of_a_build_that_cannot_be_met(build, tmp_path, options):
    result = build(*options)
    if options[0] == "--seed" and result.exit_code == 0:
        return  # every seed may do
    refused(result, code=2 if result.exit_code == 2 else 1)
    assert not (tmp_path / "out" / "index").exists()
    nothing_loads(tmp_path)


def test_folders_without_a_name(build, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", "/", "../here"):
        refused(build(out=out), "exists")
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


LATIN = "Was ist ein Gebäude?\n".encode("latin-1")


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_lines_in_another_encoding(index, tmp_path, source):
    (tmp_path / "latin.txt").write_bytes(b"stars\n" + LATIN)
    given = {"stdin": b"stars\n" + LATIN} if source == "stdin" else {}
    more = [] if source == "stdin" else ["--file", tmp_path / "latin.txt"]
    result = call("generate", "--index", index, "--max-new-tokens", 2, "--json", *more, **given)
    assert result.exit_code == 1
    assert [row["prompt"] for row in json.loads(result.stdout)] == ["stars"]
    first, last = result.stderr.splitlines()
    assert re.match("Error: line 2: the prompt .* is not UTF-8", first) and last.startswith("Error: 1 of 2 prompts")


@pytest.mark.parametrize("command", ["generate", "lookup"])
def test_an_argument_in_another_encoding(index, command):
    prompt = os.fsdecode(LATIN)  # as Python passes what is no UTF-8
    refused(call(*(["generate", "--index", index] if command == "generate" else ["lookup", index]), prompt), "prompt")


# Ctrl-C


def test_ctrl_c_ends_a_build_with_130_and_keeps_what_was_finished(tiny_checkpoint, tmp_path):
    rows = [{"prompt": f"{NOUNS[n % 15]}, case {n}", "completion": " ".join(NOUNS) * 30} for n in range(600)]
    source = write_rows(tmp_path / "long.jsonl", rows)
    out = tmp_path / "out" / "index"
    arguments = ["build-index", source, "--model", tiny_checkpoint, "--out", out, "--clusters", 3, *ONE_PROCESS]
    arguments += ["--prompt-column", "prompt", "--template", "{prompt} {completion}", "--max-tokens", 1000]
    shards = tmp_path / "out" / "index.build" / "shards"
    command = [*PROCESS, *map(str, arguments), "--shard-size", "2"]
    build = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit it ignored
    )
    try:
        while build.poll() is None and len(list(shards.glob("[0-9]*.safetensors"))) < 3:
            time.sleep(0.005)
        build.send_signal(signal.SIGINT)
        stdout, stderr = build.communicate(timeout=60)
    finally:
        build.kill()
    assert build.returncode == 130, stderr
    assert stdout == ""
    lines = stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Corpus", "Plan", "Error"]
    assert "interrupted; what was finished is kept" in lines[-1] and "run the same command again" in lines[-1]
    assert not CONTROL.search(stderr)
    assert (
        3 <= len(list(shards.glob("[0-9]*.safetensors"))) < 300
    )  # long enough that a late signal still finds it at work
    assert not list(shards.glob(".*"))
    assert not out.exists()
    nothing_loads(tmp_path)


def test_ctrl_c_in_every_command_ends_with_130(index, monkeypatch):
    def interrupt(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SemanticIndex, "load", interrupt)
    for command in (["info", index], ["verify", index], ["lookup", index, "x"], ["generate", "x", "--index", index]):
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


@pytest.mark.parametrize("option", [["--keep-ratio", "0.4"], ["--distil-from", "joint"]])
def test_options_of_compensation_need_it(tmp_path, option):
    arguments = ["build-index", "rows.jsonl", "--model", "m", "--out", str(tmp_path / "ix"), *option]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and f"{option[0]} does nothing without --compensate" in refused.stderr


def test_where_training_begins_is_no_matter_without_training(tmp_path):
    command = ["build-index", "x.jsonl", "--model", "m", "--out", str(tmp_path / "o"), "--compensate"]
    refused = CliRunner().invoke(main, [*command, "--distil-from", "joint"])
    assert refused.exit_code == 2 and "--distil-from does nothing without --distil-tokens" in refused.stderr
