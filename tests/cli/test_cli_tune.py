"""`coreinfer-sim tune`: the profiles that it writes are what decode goes by."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import call, generated, parsed, refused, setting, succeeded, write_rows

from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.index.index import SemanticIndex

FAMILIAR = "What do stars tell us about space, case 0?"


@pytest.fixture
def copied(index, tmp_path) -> Path:
    """A copy of the index, to be tuned."""
    return shutil.copytree(index, tmp_path / "copied")


@pytest.fixture
def rows(tmp_path) -> Path:
    texts = [
        {"id": str(n), "prompt": f"Tell me of stars, {n}.", "completion": f"They are {n} and more."} for n in range(10)
    ]
    return write_rows(tmp_path / "rows.jsonl", texts)


ANY = ["--max-perplexity-increase", "9000%", "--max-perplexity-increase", "fast=9000%"]


def test_the_profile_is_what_decode_takes(copied, rows):
    given = ("tune", rows, "--index", copied, "--part", "0:100", "--keep-ratio", 0.25)
    found = parsed(*given, *ANY, "--plot", rows.with_name("tuned.svg"))
    assert "similarity/energy else hybrid" in rows.with_name("tuned.svg").read_text(encoding="utf-8")
    assert found["profiles"]["balanced"]["keep_ratio"] == 0.25 and found["default_profile"] == "balanced"
    assert [row["contender"] for row in found["contenders"]] == ["similarity/energy else hybrid 0.25", "dense 16bit"]
    assert 0 < found["profiles"]["fast"]["gain"] < 1
    assert generated(copied)["keep_ratio"] == 0.25
    other = parsed(*given, *ANY, *setting("decode.engine", "transformers"))
    ratios = [each["profiles"]["balanced"]["ratio"] for each in (found, other)]
    assert ratios[1] == pytest.approx(ratios[0], abs=1e-3)
    strict = succeeded(*given, "--max-perplexity-increase", "1e-9", "--log", rows.with_name("log.jsonl"))
    assert "balanced  no gain" in strict.stdout or "balanced  plain sets, keep ratio 0.25" in strict.stdout
    assert generated(copied)["keep_ratio"] == SemanticIndex.load(copied).manifest.profile.keep_ratio
    line = refused(
        call(*given, "--log", rows.with_name("log.jsonl"), *setting("decode.engine", "transformers")), "engine"
    )
    assert "auto there, transformers here" in line


@pytest.mark.parametrize("increase", ["much", "0", "-1%", "10000%", "exact=1%", "fsat=1%", "20%"])
def test_a_promise_that_is_none(copied, rows, increase):
    result = call("tune", rows, "--index", copied, "--max-perplexity-increase", increase)
    refused(result, "0.2 and fast 0.1" if increase == "20%" else increase, code=2)


def test_what_cannot_be_tuned_on(copied, rows, tmp_path):
    given = ("tune", rows, "--index", copied, "--part", "0:100")
    refused(call(*given, "--limit", 9), "there are 9 rows to tune on, expected 10 or more")
    refused(call(*given, "--keep-ratio", 1), "keep ratio 1 is dense decode")
    refused(call(*given, "--log", tmp_path / "none" / "log.jsonl"), "there is no folder")
    refused(call(*given, "--plot", tmp_path / "tuned.pdf"), "the plot is to be tuned.pdf")
    refused(call(*given, *setting("decode.engine", "best")), "no engine 'best'", code=2)
    assert SemanticIndex.load(copied).manifest.profile is None


def test_tokens_read_what_was_tuned(copied, rows, monkeypatch):
    given = ("tune", rows, "--index", copied, "--part", "0:100", *ANY)
    found = parsed(*given, "--read-ratio", 0.3)
    profile = found["profiles"]["balanced"]
    assert (profile["read_ratio"], profile["weights"], profile["layout"]) == (0.3, "stored", "float32")
    assert [row["contender"] for row in found["contenders"]] == ["all 1 read 0.3", "dense 16bit"]
    assert "read ratio 0.3: perplexity" in succeeded("info", copied).stdout
    named = generated(copied, "--read-ratio", 0.3, prompt=FAMILIAR)
    monkeypatch.setattr(LeanEngine, "is_faster_by_token", lambda layout: layout == "float32")
    read = generated(copied, prompt=FAMILIAR)
    assert read["text"] == named["text"] and 0.2 < read["read_ratio"] < 0.4 and read["keep_ratio"] == 1.0
    other = succeeded("generate", "stars", "--index", copied, "--max-new-tokens", 2, "--weights", "int4")
    assert "was measured with stored weights, and not with int4 ones" in other.stderr
    monkeypatch.setattr(LeanEngine, "is_faster_by_token", lambda layout: False)
    assert generated(copied, prompt=FAMILIAR)["read_ratio"] == 1.0
    slow = succeeded("generate", "stars", "--index", copied, "--max-new-tokens", 2)
    assert "not found to be faster" in slow.stderr


def test_an_engine_that_reads_all_neurons_decodes_densely(copied, rows):
    given = ("tune", rows, "--index", copied, "--part", "0:100", *ANY)
    succeeded(*given, "--read-ratio", 0.3)
    options = setting("decode.engine", "transformers")
    assert generated(copied, *options, prompt=FAMILIAR)["read_ratio"] == 1.0
    succeeded(*given, *options, "--limit", 10)
    assert SemanticIndex.load(copied).manifest.profile.of_sets


def test_any_type_of_weights_may_win(copied, rows):
    given = ("tune", rows, "--index", copied, "--part", "0:100", *ANY)
    result = succeeded(*given, "--read-ratio", 0.5, "--weights", "any")
    profile = SemanticIndex.load(copied).manifest.profile
    assert profile.weights in ("int8", "int4") and f", {profile.weights} weights: perplexity" in result.stdout
    assert generated(copied)["n_new_tokens"] == 8


def test_the_ready_made_index_stays_as_it_is(rows, tmp_path, monkeypatch, index):
    """What is tuned is a copy of the user's own."""
    ready_made = shutil.copytree(index, tmp_path / "package")
    monkeypatch.setattr("coreinfer_sim.index.names.DEMO_FOLDER", ready_made)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    given = ("tune", rows, "--part", "0:100", "--read-ratio", 0.3, *ANY)
    tuned = succeeded(*given, "--index", "demo")
    own = tmp_path / "data" / "coreinfer_sim" / "indexes" / "demo"
    assert f"demo is a copy of yours now, in {own}" in tuned.stderr
    assert SemanticIndex.load("demo").folder == own and SemanticIndex.load("demo").manifest.profile.read_ratio == 0.3
    assert SemanticIndex.load(ready_made).manifest.profiles == {}
    refused(call(*given, "--index", ready_made), "stays as it is, and you have an index 'demo'")
    shutil.copytree(index, own.with_name("mine"))
    assert parsed("show")["index"] == "mine"  # the copy does not compete with the only one
