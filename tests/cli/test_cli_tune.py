"""`coreinfer-sim tune`: the profile that it writes is what decode takes by default."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import call, generated, parsed, refused, setting, succeeded, write_rows

from coreinfer_sim.index.index import SemanticIndex


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


def test_the_profile_is_what_decode_takes(copied, rows):
    given = ("tune", rows, "--index", copied, "--part", "0:100", "--keep-ratio", 0.25)
    found = parsed(*given, "--max-perplexity-increase", "9000%")
    assert found["profile"]["keep_ratio"] == 0.25 and len(found["contenders"]) == 1
    assert generated(copied)["keep_ratio"] == 0.25
    other = parsed(*given, "--max-perplexity-increase", "9000%", *setting("decode.engine", "transformers"))
    assert other["profile"]["ratio"] == pytest.approx(found["profile"]["ratio"], abs=1e-3)
    strict = succeeded(*given, "--max-perplexity-increase", "1e-9", "--log", rows.with_name("log.jsonl"))
    assert "No keep ratio keeps the promise" in strict.stdout or "keep ratio 0.25 by default now" in strict.stdout
    assert generated(copied)["keep_ratio"] == SemanticIndex.load(copied).manifest.profile.keep_ratio
    line = refused(
        call(*given, "--log", rows.with_name("log.jsonl"), *setting("decode.engine", "transformers")), "engine"
    )
    assert "auto there, transformers here" in line


@pytest.mark.parametrize("increase", ["much", "0", "-1%", "10000%"])
def test_a_promise_that_is_none(copied, rows, increase):
    result = call("tune", rows, "--index", copied, "--max-perplexity-increase", increase)
    refused(result, increase, code=2)


def test_what_cannot_be_tuned_on(copied, rows, tmp_path):
    given = ("tune", rows, "--index", copied, "--part", "0:100")
    refused(call(*given, "--limit", 9), "there are 9 rows to tune on, expected 10 or more")
    refused(call(*given, "--keep-ratio", 1), "keep ratio 1 is dense decode")
    refused(call(*given, "--log", tmp_path / "none" / "log.jsonl"), "there is no folder")
    refused(call(*given, *setting("decode.engine", "best")), "no engine 'best'", code=2)
    assert SemanticIndex.load(copied).manifest.profile is None
