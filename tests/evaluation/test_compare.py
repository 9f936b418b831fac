"""`coreinfer_sim.evaluate`: from files and names to a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import coreinfer_sim
from coreinfer_sim.base.errors import ConfigError, CorpusError
from coreinfer_sim.evaluation.compare import contender_of
from coreinfer_sim.index.manifest import ProfileInfo

BY_TOKEN = ProfileInfo(1.0, False, 0.03, 1.01, 1.0, 1.02, 60, 12, 0.5, "stored", "float32", 80, 100)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"id": str(n), "prompt": f"Tell me of stars, {n}.", "completion": f"They are {n} and more."} for n in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_contenders_by_name(rows, wide_index, wide_checkpoint):
    found = coreinfer_sim.evaluate(
        rows, wide_index, wide_checkpoint, contenders=["dense", "similarity"], keep_ratios=[0.5]
    )
    assert [row["contender"] for row in found.summary] == ["dense 16bit", "similarity/energy 0.5"]
    dense, sparse = found.summary
    assert (dense["ratio"], dense["n_rows"]) == (1.0, 3) and sparse["mlp_bytes_per_token"] < dense[
        "mlp_bytes_per_token"
    ]
    assert found.model == wide_checkpoint and [str(each) for each in found.contenders][0] == "dense 16bit"


def test_what_is_missing_is_said(wide_index):
    with pytest.raises(CorpusError, match="no-such.jsonl"):
        coreinfer_sim.evaluate("./no-such.jsonl", wide_index)


@pytest.mark.parametrize(
    ("change", "model", "expected"),
    [
        ({}, "model", "all 1 read 0.5"),
        ({}, "model.gguf", "all 1 read 0.5 stored"),
        ({"weights": "int8"}, "model", "all 1 read 0.5 int8"),
        ({"read_ratio": 1.0, "weights": "int8"}, "model", "dense int8"),
        ({"read_ratio": 1.0}, "model", "dense 16bit"),
        ({"read_ratio": 1.0, "keep_ratio": 0.6}, "model", "similarity/energy else hybrid 0.6"),
        (
            {"read_ratio": 1.0, "keep_ratio": 0.6, "compensated": True},
            "model",
            "similarity/compensated else global 0.6",
        ),
    ],
)
def test_a_profile_is_a_contender(wide_index, monkeypatch, change, model, expected):
    profiles = {"fast": replace(BY_TOKEN, **change)}
    monkeypatch.setattr(wide_index, "manifest", replace(wide_index.manifest, profiles=profiles))
    assert str(contender_of(coreinfer_sim.Profile.FAST, wide_index, model)) == expected
    with pytest.raises(ConfigError, match="has no profile balanced, expected one of exact, fast"):
        contender_of(coreinfer_sim.Profile.BALANCED, wide_index, model)
