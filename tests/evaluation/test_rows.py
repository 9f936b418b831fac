"""Rows to evaluate on: read, checked and divided by their ids."""

from __future__ import annotations

import json

import pytest

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.evaluation.rows import hash_percent, read_rows


def test_rows_by_part(tmp_path):
    path = tmp_path / "things.jsonl"
    raw = [{"id": f"t{n}", "prompt": f"p{n}", "completion": "c"} for n in range(200)]
    path.write_text("\n".join(map(json.dumps, raw)))
    low, high = (read_rows(path, part, None) for part in (range(0, 70), range(70, 100)))
    assert {r.id for r in low} | {r.id for r in high} == {r["id"] for r in raw}
    assert not {r.id for r in low} & {r.id for r in high}
    assert all(hash_percent(r.id) < 70 for r in low)
    assert len(read_rows(path, range(0, 100), 7)) == 7
    path.write_text('{"id": "1", "prompt": "p"}\n')
    with pytest.raises(CorpusError, match="expected an object with id, prompt, completion"):
        read_rows(path, range(0, 100), None)
    path.write_text("nothing\n")
    with pytest.raises(CorpusError, match="line 1, is no JSON"):
        read_rows(path, range(0, 100), None)
    path.write_bytes('{"id": "1", "prompt": "café", "completion": "c"}'.encode("latin-1"))
    with pytest.raises(CorpusError, match="is not UTF-8 .* convert it first"):
        read_rows(path, range(0, 100), None)
    with pytest.raises(CorpusError, match="1 row, .* none whose id hashes .* wider part"):
        path.write_text(json.dumps(raw[0]))
        read_rows(path, range(hash_percent("t0") + 1, 100), None)
    path.write_text('{"id": "1", "prompt": "p", "completion": 5}\n')
    with pytest.raises(CorpusError, match="line 1: completion is 5, expected text"):
        read_rows(path, range(0, 100), None)
    for empty in ("", '{"id": "1", "prompt": "p", "completion": " "}\n'):
        path.write_text(empty)
        with pytest.raises(CorpusError, match="give a file with rows"):
            read_rows(path, range(0, 100), None)
