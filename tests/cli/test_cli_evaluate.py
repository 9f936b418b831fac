"""`coreinfer-sim evaluate`."""

from __future__ import annotations

import json
import re
import sys

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from scored import ROWS
from tiny_models import save_tiny_checkpoint


def test_sparse_prefill_goes_through_the_command(tiny_checkpoint, tmp_path):
    row = {"id": "1", "prompt": ROWS[0].prompt, "completion": ROWS[0].completion}
    (tmp_path / "things.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    log = tmp_path / "log.jsonl"
    command = ["evaluate", str(tmp_path / "things.jsonl"), "--model", tiny_checkpoint, "--log", str(log), "--json"]
    done = CliRunner().invoke(main, [*command, "--set", "decode.prefill=sparse"])
    assert done.exit_code == 0, done.output
    found = [row["contender"] for row in json.loads(done.stdout)]
    assert found == [
        "dense 16bit",
        "random 0.4",
        "dense int8",
        "dense q4_0",
    ]  # what one would take instead is there unasked
    dense = CliRunner().invoke(main, [*command, "--contender", "random"])
    assert dense.exit_code == 1 and "prefill (sparse there, not given here)" in dense.stderr
    refused = CliRunner().invoke(main, [*command, "--set", "decode.prefill=sparse", "--contender", "griffin"])
    assert refused.exit_code == 1 and "griffin 0.4 chooses by the prompt's own activations" in refused.stderr


def test_int8_is_left_out_where_no_engine_has_it(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "model", hidden_act="mish")
    row = {"id": "1", "prompt": ROWS[0].prompt, "completion": ROWS[0].completion}
    (tmp_path / "things.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "things.jsonl"), "--model", folder, "--json"])
    assert done.exit_code == 0, done.output
    assert "dense int8" not in [row["contender"] for row in json.loads(done.stdout)]
    assert "Note: int8 weights are left out, as " in done.stderr and "activation is mish" in done.stderr


def test_the_command(tiny_checkpoint, tmp_path):
    path = tmp_path / "things.jsonl"
    path.write_text("\n".join(json.dumps({"id": r.id, "prompt": r.prompt, "completion": r.completion}) for r in ROWS))
    out, log = tmp_path / "out.json", tmp_path / "log.jsonl"
    arguments = ["evaluate", str(path), "--model", tiny_checkpoint, "--keep-ratio", "0.5", "--log", str(log)]
    done = CliRunner().invoke(main, [*arguments, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["contender"] for row in found] == [
        "dense 16bit",
        "random 0.5",
        "stability 0.5",
        "griffin 0.5",
        "oracle 0.5",
        "dense int8",
        "dense q4_0",
    ]
    assert found[0]["ratio"] == 1.0
    assert json.loads(out.read_text())["contenders"] == found
    assert len(log.read_text().splitlines()) == 1 + 14
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0 and len(log.read_text().splitlines()) == 1 + 14
    assert "griffin 0.5" in table.stdout
    refused = CliRunner().invoke(main, [*arguments, "--contender", "similarity"])
    assert refused.exit_code == 1 and "needs an index" in refused.stderr
    assert CliRunner().invoke(main, [*arguments, "--part", "9:3"]).exit_code == 2


def test_the_command_generates(tiny_checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "things.jsonl"
    path.write_text("\n".join(json.dumps({"id": r.id, "prompt": r.prompt, "completion": r.completion}) for r in ROWS))
    (tmp_path / "others.jsonl").write_text(path.read_text())
    arguments = ["evaluate", str(path), str(tmp_path / "others.jsonl"), "--model", tiny_checkpoint]
    arguments += ["--contender", "dense", "--contender", "griffin", "--generate", "--max-new-tokens", "5"]
    done = CliRunner().invoke(main, [*arguments, "--json", "--plot", str(tmp_path / "a.svg")])
    assert done.exit_code == 0, done.stderr
    dense, griffin = json.loads(done.stdout)
    assert set(dense["sets"]) == {"things", "others"}
    assert dense["text"] == dense["sets"]["things"]["text"] == dense["sets"]["others"]["text"]
    assert set(griffin["text"]) == {"exact_match", "f1", "rouge_l", "bleu", "chrf"}
    assert (tmp_path / "a.svg").exists()
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0 and table.stdout.count("mean over sets") == 2
    each = CliRunner().invoke(main, [*arguments, "--per-set"])
    assert each.exit_code == 0 and len(each.stdout.splitlines()) == len(table.stdout.splitlines()) + 2 + 4
    lines = [line.split() for line in each.stdout.splitlines() if re.match(r"griffin 0.4 +things +\d", line)]
    line = lines[0]  # the other is of the generated texts
    assert float(line[3]) == pytest.approx(griffin["sets"]["things"]["perplexity"], abs=0.01)
    assert line[-1] == str(len(ROWS))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as if it were not installed
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "scoring generated texts needs sacrebleu" in refused.stderr


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    rows = tmp_path / "things.jsonl"
    rows.write_text(json.dumps({"id": "1", "prompt": "p", "completion": "c"}))

    def refused(name: str) -> str:
        done = CliRunner().invoke(main, ["evaluate", str(rows), "--model", "./none", "--plot", str(tmp_path / name)])
        assert done.exit_code == 1
        return done.stderr

    assert "expected a name that ends in .html, .png or .svg" in refused("a.pdf")
    assert "no folder" in refused("none/a.png")
    monkeypatch.setitem(sys.modules, "altair", None)  # as if it were not installed
    assert "a plot needs altair, not found here; install the extra plots" in refused("a.png")


def test_what_would_be_lost_or_mixed_up_is_refused_before_the_model_loads(tmp_path):
    line = json.dumps({"id": "1", "prompt": "p", "completion": "c"}) + "\n"
    (tmp_path / "a").mkdir()
    for name, lines in (("things.jsonl", line), ("a/things.jsonl", line), ("twice.jsonl", line * 2)):
        (tmp_path / name).write_text(lines)

    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["evaluate", *arguments, "--model", "./none", "--contender", "dense"])
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        return done.stderr

    things = str(tmp_path / "things.jsonl")
    assert "there is no folder" in refused(things, "--out", str(tmp_path / "none" / "out.json"))
    assert "two sets are called things" in refused(things, str(tmp_path / "a" / "things.jsonl"))
    assert "two rows of twice have the id '1'" in refused(str(tmp_path / "twice.jsonl"))
    assert "keep ratio is 1.5" in refused(things, "--keep-ratio", "1.5")


@pytest.mark.parametrize("n_rows", [1, 12])
def test_rows_of_which_none_can_be_scored_are_refused(tiny_checkpoint, tmp_path, n_rows):
    rows = [{"id": str(i), "prompt": "What is it?", "completion": "x"} for i in range(n_rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [str(tmp_path / "rows.jsonl"), "--model", tiny_checkpoint, "--contender", "dense"]
    refused = CliRunner().invoke(main, ["evaluate", *arguments])
    assert refused.exit_code == 1 and f"none of {n_rows} row" in refused.stderr and not refused.stdout
