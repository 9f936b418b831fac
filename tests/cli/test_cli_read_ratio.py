"""`--read-ratio`: what a text costs where each token chooses what it reads."""

from __future__ import annotations

import json
import re

import pytest
from commands import NOUNS, call, generated, parsed, refused, setting, succeeded
from scored import ROWS
from tiny_models import save_tiny_checkpoint

HALF = ("--read-ratio", 0.5)


def without_index(model, *more):
    return ("generate", "How do stars form?", "--model", model, "--max-new-tokens", 8, *more)


@pytest.mark.parametrize("weights", ["stored", "bf16", "int8", "int4"])
def test_no_index_is_needed(tiny_checkpoint, weights):
    command = without_index(tiny_checkpoint, *HALF, "--weights", weights)
    first, again = parsed(*command), parsed(*command)
    assert (first["mode"], first["keep_ratio"], first["engine"]) == ("all", 1.0, "lean")
    assert 0.35 < first["read_ratio"] < 0.65
    assert (first["text"], first["read_ratio"]) == (again["text"], again["read_ratio"])
    shown = succeeded(*command)
    assert shown.stdout == f"> How do stars form?\n{first['text']}\n"
    assert re.match(rf"  all · holds 1\.00 · reads {first['read_ratio']:.2f} · engine lean · 8 tokens", shown.stderr), (
        shown.stderr
    )


def test_of_what_an_index_holds(index):
    familiar = generated(index, *HALF, prompt=f"What do {NOUNS[0]} tell us about space, case 0?")
    assert (familiar["mode"], familiar["keep_ratio"], familiar["confident"]) == ("similarity", 1.0, True)
    assert 0.35 < familiar["read_ratio"] < 0.65
    held = generated(index, *HALF, "--keep-ratio", 0.4, *setting("select.fallback", "none"))
    assert held["keep_ratio"] == pytest.approx(0.4, abs=0.02) and held["read_ratio"] < 0.4
    whole = generated(index, "--read-ratio", 1, *setting("select.fallback", "none"))
    assert whole["keep_ratio"] == whole["read_ratio"] == 0.5


def test_unfamiliar_prompts_read_everything(index):
    found = generated(index, *HALF, prompt="zzz qqq 0x3f")
    assert (found["mode"], found["confident"], found["read_ratio"]) == ("dense", False, 1.0)


def test_compare_shows_dense_beside_it(tiny_checkpoint, dense_text):
    sparse, dense = parsed(*without_index(tiny_checkpoint, "--read-ratio", 0.2, "--compare"))
    assert (sparse["mode"], dense["mode"], dense["read_ratio"]) == ("all", "dense", 1.0)
    assert dense["text"] == dense_text != sparse["text"]
    text = succeeded(*without_index(tiny_checkpoint, "--read-ratio", 0.2, "--compare")).stdout
    assert re.search(r"\[all\]\n.*\n  all · holds 1\.00 · reads 0\.\d\d · ", text)
    assert f"\n[dense]\n{dense_text}\n  dense · holds 1.00 · engine lean · 8 tokens" in text


def test_a_setting_by_its_name(tiny_checkpoint):
    by_option, by_name = (
        parsed(*without_index(tiny_checkpoint, *given)) for given in (HALF, setting("select.read_ratio", 0.5))
    )
    assert by_option["text"] == by_name["text"] and by_option["read_ratio"] == by_name["read_ratio"]


@pytest.mark.parametrize("options", [setting("sample.num_beams", 3), ["--temperature", 1.5]], ids=str)
def test_beams_and_samples(tiny_checkpoint, options):
    found = parsed(*without_index(tiny_checkpoint, *HALF, *options))
    assert found["n_new_tokens"] == 8 and 0.3 < found["read_ratio"] < 0.7


@pytest.mark.parametrize("ratio", ["0", "-0.5", "1.01", "nan"])
def test_ratios_out_of_range(tiny_checkpoint, ratio):
    refused(
        call(*without_index(tiny_checkpoint, "--read-ratio", ratio)),
        "read ratio is .*, expected a number above 0 and at most 1",
    )


def test_what_cannot_be_served(tiny_checkpoint):
    for engine in ("transformers", "compiled"):
        result = call(*without_index(tiny_checkpoint, *HALF, "--engine", engine))
        refused(result, f"the engine {engine} reads all held neurons", "use the engine lean")
        assert result.stdout == ""


def test_where_it_does_nothing(tiny_checkpoint):
    done = succeeded(*without_index(tiny_checkpoint, *HALF, "--mode", "dense"))
    assert "Note: read_ratio has no effect in mode dense.\n" in done.stderr
    assert "Note" not in succeeded(*without_index(tiny_checkpoint, *HALF)).stderr


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "things.jsonl"
    path.write_text("\n".join(json.dumps({"id": r.id, "prompt": r.prompt, "completion": r.completion}) for r in ROWS))
    return path


def test_evaluate_crosses_read_ratios(tiny_checkpoint, rows):
    command = ("evaluate", rows, "--model", tiny_checkpoint, "--contender", "dense", "--contender", "all")
    weights = ("--weights", "16bit", "--weights", "int8", "--weights", "q8_0")
    found = parsed(*command, *weights, "--read-ratio", 0.3, "--read-ratio", 0.6)
    assert [row["contender"] for row in found] == [
        *("dense 16bit", "all 1 read 0.3", "all 1 read 0.6"),
        *("dense int8", "all 1 read 0.3 int8", "all 1 read 0.6 int8"),
        "dense q8_0",
    ]
    by_name = {row["contender"]: row for row in found}
    assert by_name["dense 16bit"]["read_ratio"] == by_name["dense q8_0"]["read_ratio"] == 1.0
    for kind in ("", " int8"):
        few, many = by_name[f"all 1 read 0.3{kind}"], by_name[f"all 1 read 0.6{kind}"]
        assert few["read_ratio"] == pytest.approx(0.3, abs=0.1) and many["read_ratio"] == pytest.approx(0.6, abs=0.1)
        assert few["mlp_bytes_per_token"] < many["mlp_bytes_per_token"]


def test_evaluate_compares_all_only_where_tokens_choose(tiny_checkpoint, rows):
    command = ("evaluate", rows, "--model", tiny_checkpoint)
    names = [row["contender"] for row in parsed(*command)]
    assert not any(name.startswith("all") for name in names)
    names = [row["contender"] for row in parsed(*command, "--read-ratio", 0.4)]
    assert "all 1 read 0.4" in names and "random 0.4 read 0.4" in names
    refused(call(*command, "--read-ratio", 2), "read ratio is 2.0, expected a number above 0 and at most 1")


def test_what_is_zero_is_said_to_be_skipped(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model", hidden_act="relu")
    shown = succeeded("generate", "How do stars form?", "--model", folder, "--mode", "dense", "--max-new-tokens", 4)
    assert re.search(r"reads 0\.[3-7]\d, as the others are zero: nothing is left out", shown.stderr)
