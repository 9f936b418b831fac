"""`coreinfer-sim build-index`: what it says, what arrives, and what it refuses."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import time

import pytest
import torch
from commands import CONTROL, NOUNS, ONE_PROCESS, PROCESS, TOPICS, call, nothing_loads, refused, setting, write_rows
from coreinfer_sim_cli.console import ConsoleProgress


def test_a_build_says_what_it_read_and_what_it_will_take(built, tiny_checkpoint):
    out, run = built
    assert re.search(r"^Corpus: 45 prompts with [\d,]+ tokens kept of 45 rows\.$", run.stderr, re.MULTILINE)
    assert re.search(
        r"^Plan: 45 prompts, .* 3 clusters, 1 shard; disk .*; peak memory about .*\.$", run.stderr, re.MULTILINE
    )
    recognised, *_ = run.stderr.splitlines()
    assert recognised.startswith("Reading ") and "prompts in 'prompt', completions in 'completion'" in recognised
    assert run.stderr.splitlines()[3].startswith("Nothing is promised, as that takes 200 texts")
    assert len(run.stderr.splitlines()) == 4  # no bars where there is no terminal
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
    named = {"alpha": 0.3, "beta": 0.2, "gamma": 0.6, "seed": 5, "batch_size": 3, "shard_size": 7, "layers": "1:"}
    run = build(
        *(part for name, value in named.items() for part in setting(f"build.{name}", value)),
        *(
            "--clusters",
            2,
            "--limit",
            20,
            *setting("corpus.max_tokens", 9),
            *setting("model.dtype", "bfloat16"),
            "--threads",
            2,
        ),
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
    kept = build("--clusters", 2, *setting("corpus.deduplicate", "no"), "--json", source=source)
    assert json.loads(kept.stdout)["corpus"]["n_sentences"] == 3
    dropped = build("--clusters", 2, "--json", "--force", source=source)
    assert json.loads(dropped.stdout)["corpus"]["n_sentences"] == 2 and "1 duplicate dropped" in dropped.stderr


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
        "there is no file or folder '/nowhere/corpus.jsonl'",
        "expected a corpus",
        "check the path",
    )
    nothing_loads(tmp_path)


@pytest.mark.parametrize("option", ["--prompt-column=question", "--template={question}"])
def test_a_missing_column(build, tmp_path, option):
    refused(build(option), r"\['completion', 'prompt'\]", "expected question", "prompt.column")
    nothing_loads(tmp_path)


def test_a_broken_corpus(build, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "stars"}\n{"prompt": "bread\n')
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("datasets").addHandler(handler)
    try:
        refused(build(source=tmp_path / "broken.jsonl"), "broken.jsonl, line 2, is no JSON", "mend or remove it")
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert [record.getMessage() for record in logged] == []  # nothing beside the one line
    nothing_loads(tmp_path)


def test_more_clusters_than_prompts(build, tmp_path):
    refused(build("--clusters", 46), "46 clusters", "45 prompts", "smaller .*clusters")
    nothing_loads(tmp_path)
    assert not (tmp_path / "out" / "index").exists()


def test_an_output_folder_that_exists(build, index, tmp_path):
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    refused(build(out=index), "exists already", "expected a new or an empty folder", "force")
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before
    (tmp_path / "file").write_text("dear")
    refused(build(out=tmp_path / "file", source="/nowhere"), "file is a file, expected")
    refused(build("--force", out=tmp_path / "file"), "is a file")
    assert (tmp_path / "file").read_text() == "dear"


def test_other_settings_than_those_of_a_broken_off_build(build, tmp_path, monkeypatch):
    def interrupt(_progress: ConsoleProgress, stage: str, *_: object) -> None:
        if stage == "Language model":  # a build that has finished nothing leaves nothing
            raise KeyboardInterrupt

    refused(build("--clusters", 46), "46 clusters")  # leaves nothing
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleProgress, "start", interrupt)
        assert build("--clusters", 2).exit_code != 0
    refused(
        build("--clusters", 3, *setting("build.alpha", 0.7)),
        r"clusters \(2 there, 3 here\), alpha \(0.4 there, 0.7 here\)",
        "expected the same",
        "force",
    )
    assert build("--clusters", 3, "--force").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        setting("build.alpha", 2),
        setting("build.beta", 0),
        setting("build.gamma", -1),
        ["--clusters", "0"],
        setting("build.layers", "::0"),
        setting("build.layers", 7),
        setting("build.batch_size", 0),
        ["--compensate", "--keep-ratio", "1"],
        ["--compensate", *setting("compensate.tokens", 0)],
        ["--template", "no column"],
        ["--template", "{prompt:d}"],
        setting("corpus.max_tokens", 2000),
        setting("model.encoder", "/nowhere/encoder"),
        setting("model.dtype", "int3"),
        pytest.param(
            setting("model.device", "cuda"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=" ".join,
)
def test_settings_of_a_build_that_cannot_be_met(build, tmp_path, options):
    result = build(*options)
    refused(result, code=2 if result.exit_code == 2 else 1)
    assert not (tmp_path / "out" / "index").exists()
    nothing_loads(tmp_path)


def test_folders_without_a_name(build, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("dear")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", "/", "../here"):
        refused(build(out=out), "exists")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "here" / "file"]


def test_ctrl_c_ends_a_build_with_130_and_keeps_what_was_finished(tiny_checkpoint, tmp_path):
    rows = [{"prompt": f"{NOUNS[n % 15]}, case {n}", "completion": " ".join(NOUNS) * 30} for n in range(600)]
    source = write_rows(tmp_path / "long.jsonl", rows)
    out = tmp_path / "out" / "index"
    arguments = ["build-index", source, "--model", tiny_checkpoint, "--out", out, "--clusters", 3, *ONE_PROCESS]
    arguments += [
        "--prompt-column",
        "prompt",
        "--template",
        "{prompt} {completion}",
        *setting("corpus.max_tokens", 1000),
    ]
    shards = tmp_path / "out" / "index.build" / "shards"
    command = [*PROCESS, *map(str, arguments), *setting("build.shard_size", 2)]
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
    assert [line.split(":")[0].split()[0] for line in lines] == ["Reading", "Corpus", "Plan", "Error"]
    assert "interrupted; run the same command again to go on from what was finished" in lines[-1]
    assert not CONTROL.search(stderr)
    assert (
        3 <= len(list(shards.glob("[0-9]*.safetensors"))) < 300
    )  # long enough that a late signal still finds it at work
    assert not list(shards.glob(".*"))
    assert not out.exists()
    nothing_loads(tmp_path)


@pytest.mark.parametrize(
    ("option", "named"),
    [(["--keep-ratio", "0.4"], "--keep-ratio"), (setting("compensate.tokens", 900), "compensate.tokens")],
)
def test_settings_of_compensation_need_it(tmp_path, option, named):
    arguments = ["build-index", "rows.jsonl", "--model", "m", "--out", str(tmp_path / "ix"), *option]
    refused(call(*arguments), f"{named} does nothing without --compensate", code=2)
