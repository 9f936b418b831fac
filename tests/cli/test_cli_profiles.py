"""`--profile`, what the user's settings prefer, and what is said and completed of an index's profiles."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from commands import call, generated, parsed, refused, setting, succeeded, write_rows
from coreinfer_sim_cli.main import main

from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo

FAMILIAR = "What do stars tell us about space, case 0?"
BALANCED = ProfileInfo(1.0, False, 0.03, 1.01, 1.0, 1.02, 60, 12, 0.5, "stored", "float32", 80, 100)
FAST = replace(BALANCED, max_increase=0.1, ratio=1.06, high=1.09, read_ratio=0.2, total_bytes=50)


@pytest.fixture(autouse=True)
def _own_settings(tmp_path, monkeypatch):
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(LeanEngine, "is_faster_by_token", lambda layout: layout == "float32")


@pytest.fixture
def tuned(index, tmp_path) -> Path:
    """A copy of the index with both profiles."""
    copied = shutil.copytree(index, tmp_path / "tuned")
    SemanticIndex.load(copied).write_profiles({"balanced": BALANCED, "fast": FAST})
    return copied


def read_ratio(folder: Path, *more: object) -> float:
    """Return what a token read."""
    return float(generated(folder, *more, prompt=FAMILIAR)["read_ratio"])


def test_a_profile_says_what_tokens_read(tuned, dense_text):
    assert read_ratio(tuned) == read_ratio(tuned, "--profile", "balanced") == read_ratio(tuned, "--read-ratio", 0.5)
    assert read_ratio(tuned, "--profile", "fast") == read_ratio(tuned, "--read-ratio", 0.2) < read_ratio(tuned)
    exact = generated(tuned, "--profile", "exact")
    assert (exact["text"], exact["read_ratio"]) == (dense_text, 1.0)
    assert parsed("run", "stars", "--index", tuned, "--profile", "fast", "--max-new-tokens", 2)["n_new_tokens"] == 2


def test_exact_works_everywhere(index, tiny_checkpoint, dense_text):
    exact = succeeded("generate", "How do stars form?", "--index", index, "--profile", "exact", "--max-new-tokens", 8)
    assert dense_text in exact.stdout and "Decode is dense, as" not in exact.stderr
    alone = "generate", "How do stars form?", "--model", tiny_checkpoint, "--max-new-tokens", 8
    without = succeeded(*alone, "--profile", "exact")
    assert dense_text in without.stdout and "there is no index" not in without.stderr
    refused(call(*alone, "--profile", "fast"), "the profile fast was asked for without an index")


def test_what_cannot_be_taken(index, tuned):
    given = "generate", "stars", "--max-new-tokens", 2
    line = refused(call(*given, "--index", index, "--profile", "fast"), "has no profile fast, expected one of exact")
    assert "'coreinfer-sim tune' measures" in line
    wrong = call(*given, "--index", index, "--profile", "fsat")
    refused(wrong, "profile is 'fsat', expected one of exact, balanced, fast; nearest: fast", code=2)
    beside = call(*given, "--index", tuned, "--profile", "fast", "--read-ratio", 0.4)
    refused(beside, "the profile fast was asked for beside read_ratio")
    exported = ("--engine", "llamacpp", *setting("decode.exported", "x"))
    refused(call(*given, "--index", tuned, "--profile", "fast", *exported), "does not apply to the engine llamacpp")


def test_one_without_a_gain_is_not_the_default(tuned, dense_text):
    index = SemanticIndex.load(tuned)
    index.write_profiles({"balanced": replace(BALANCED, read_ratio=1.0, layout=""), "fast": FAST})
    done = succeeded("generate", "How do stars form?", "--index", tuned, "--max-new-tokens", 8)
    assert dense_text in done.stdout
    assert f"Decode is dense, as nothing in {tuned} that reads fewer bytes keeps perplexity within +3.0%" in done.stderr
    assert read_ratio(tuned, "--profile", "fast") < 0.3
    lines = succeeded("info", tuned).stdout.splitlines()
    (exact,), (balanced,) = ([line for line in lines if f" {name} " in line] for name in ("exact", "balanced"))
    assert "* exact" in exact and "* balanced" not in balanced and "no gain: nothing that reads fewer bytes" in balanced


def test_info_lists_them(index, tuned):
    shown = succeeded("show", tuned).stdout
    words = "tokens choose, read ratio 0.2: perplexity +6.0% (+0.0% to +9.0%) on 12 rows, at most +10.0% allowed"
    assert f"fast      {words}, 50% fewer bytes a token" in shown and "* balanced  tokens choose" in shown
    assert "fast      not measured; 'coreinfer-sim tune' measures it" in succeeded("show", index).stdout
    found = parsed("info", tuned)
    assert found["default_profile"] == "balanced" and parsed("info", index)["default_profile"] == "exact"
    assert [(name, each["gain"]) for name, each in found["profiles"].items()] == [
        ("exact", 0.0),
        *(("balanced", pytest.approx(0.2)), ("fast", 0.5)),
    ]


def test_a_preference_gives_way(index, tuned, tiny_checkpoint, monkeypatch, dense_text):
    """It is taken where the index has it and nothing else was asked for."""
    assert "profile = fast" in succeeded("config", "set", "profile", "fast").stdout
    fast = read_ratio(tuned)
    assert fast < 0.3 and fast == read_ratio(tuned, "--profile", "fast")
    assert read_ratio(tuned, "--profile", "balanced") == read_ratio(tuned, "--read-ratio", 0.5) > fast
    assert parsed("generate", "stars", "--index", tuned, "--mode", "dense", "--max-new-tokens", 2)["mode"] == "dense"
    other = succeeded("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8)
    assert dense_text in other.stdout and "has no profile fast, which your settings prefer" in other.stderr
    assert succeeded("generate", "stars", "--model", tiny_checkpoint, "--max-new-tokens", 2).stdout
    monkeypatch.setenv("COREINFER_SIM_PROFILE", "exact")
    assert read_ratio(tuned) == 1.0
    monkeypatch.setenv("COREINFER_SIM_GENERATE_PROFILE", "balanced")
    assert fast < read_ratio(tuned) < 1.0
    refused(call("config", "set", "profile", "fsat"), "nearest: fast")
    monkeypatch.setenv("COREINFER_SIM_PROFILE", "fsat")
    monkeypatch.delenv("COREINFER_SIM_GENERATE_PROFILE")
    refused(call("generate", "stars", "--index", tuned), "profile is 'fsat'")


def test_shells_complete_those_of_the_index(index, tuned):
    def completed(*words: str) -> dict[str, str | None]:
        found = ShellComplete(main, {}, "coreinfer-sim", "_C").get_completions(list(words), "")
        return {each.value: each.help for each in found}

    assert list(completed("run", "--index", str(index), "--profile")) == ["exact"]
    offered = completed("serve", "--index", str(tuned), "--profile")
    assert list(offered) == ["exact", "balanced", "fast"] and "50% fewer bytes a token" in str(offered["fast"])
    assert list(completed("run", "--index", "none", "--profile")) == ["exact", "balanced", "fast"]


def test_evaluate_compares_them(tuned, index, tmp_path):
    rows = [
        {"id": str(n), "prompt": f"Tell me of stars, {n}.", "completion": f"They are {n} and more."} for n in range(2)
    ]
    given = "evaluate", write_rows(tmp_path / "rows.jsonl", rows), "--index"
    names = [part for name in ("exact", "balanced", "fast") for part in ("--contender", name)]
    found = parsed(*given, tuned, *names)
    assert [row["contender"] for row in found] == ["dense 16bit", "all 1 read 0.5", "all 1 read 0.2"]
    refused(call(*given, index, "--contender", "fast"), "has no profile fast")
