"""An index with compensated sets in use: lookup, generation, tune, evaluate, info."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from tiny_models import N_LAYERS

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.base.settings import Mode, Score
from coreinfer_sim.choosing.index_sets import IndexSets, default_sets, wanted_sets
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.generation.opening import load
from coreinfer_sim.index.compensated import load_compensated
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo, compensation_file, manifest_checksum
from coreinfer_sim.models.loading import load_model
from coreinfer_sim.models.mlps import mlp_bytes


def test_an_index_brings_its_compensated_sets(built, tiny_checkpoint, encoder):
    index = SemanticIndex.load(built, encoder)
    language_model = load_model(tiny_checkpoint)
    assert wanted_sets(index) == (0.5, True)
    assert index.manifest.holds_sets(0.7) and not index.manifest.holds_sets(0.6)
    dense = sum(layer.n_bytes for layer in language_model.layers)
    for ratio in (0.5, 0.7):
        chosen = IndexSets(index, ratio).of_match(index.lookup("Tell me of planets.")[0])
        assert chosen.compensation is not None and chosen.mode == "similarity"
        assert 0.85 * ratio * dense < mlp_bytes(language_model.layers, chosen.ids, chosen.compensation) <= ratio * dense
    (match,) = index.lookup("stars")
    assert IndexSets(index, 0.5).of_corpus().compensation is not None
    for plain in (IndexSets(index, 0.6), IndexSets(index, 0.5, "paper"), IndexSets(index, 0.5, compensated=False)):
        assert plain.of_match(match).compensation is None
    part = IndexSets(index, 0.5, layers="1:").of_match(match)
    assert set(part.ids) == set(part.compensation) == {1, 2}


def test_a_compensated_index_generates(built, tiny_checkpoint):
    with load(built, tiny_checkpoint, keep_ratio=0.5) as generator:
        run = generator.generate("Tell me of bread.", max_new_tokens=5)
    assert run.selection.compensation is not None and run.selection.mode in ("similarity", "global")


def test_a_damaged_set_is_refused_when_it_is_read(built, encoder, tmp_path):
    copy = shutil.copytree(built, tmp_path / "index")
    path = copy / compensation_file(0.5, None)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    index = SemanticIndex.load(copy, encoder)
    with pytest.raises(IndexFormatError, match="has the checksum"):
        IndexSets(index, 0.5).of_corpus()
    path.unlink()
    with pytest.raises(IndexFormatError, match="lacks"):
        SemanticIndex.load(copy, encoder)


def test_only_what_is_compensated_decodes_at_the_compensated_keep_ratio(built, tiny_checkpoint, encoder):
    index, layers = SemanticIndex.load(built, encoder), load_model(tiny_checkpoint).layers
    plain, fitted = (index.manifest.settings.gamma, False), (0.5, True)
    assert plain[0] == 0.8
    assert wanted_sets(index) == fitted and wanted_sets(index, compensated=False) == plain
    assert wanted_sets(index, 0.7) == (0.7, True) and wanted_sets(index, 0.6) == (0.6, False)
    assert wanted_sets(index, 0.7, compensated=False) == (0.7, False)
    assert IndexSets(index).of_corpus().compensation
    assert len(IndexSets(index, compensated=False).of_corpus().ids[0]) == 38  # of 48
    for mode, options, wanted in (
        ("similarity", {}, fitted), ("global", {}, fitted), ("stability", {}, plain), ("hybrid", {}, plain),
        ("similarity", {"score": "paper"}, plain),
        ("global", {"compensated": False}, plain),
    ):  # fmt: skip
        assert (
            default_sets(index, Mode(mode), **{k: Score(v) if k == "score" else v for k, v in options.items()})
            == wanted
        )
        assert make_predictor(mode, layers, index, **options)


@pytest.mark.parametrize(("keep_ratio", "compensated"), [(0.5, True), (0.5, False), (0.6, False), (1.0, False)])
def test_the_profile_says_what_decodes_where_no_keep_ratio_is_named(
    built, tiny_checkpoint, encoder, keep_ratio, compensated, tmp_path
):
    copy = shutil.copytree(built, tmp_path / "index")
    SemanticIndex.load(copy).write_profiles(
        {"balanced": ProfileInfo(keep_ratio, compensated, 0.1, 1.0, 1.0, 1.0, 1, 10)}
    )
    index, layers = SemanticIndex.load(copy, encoder), load_model(tiny_checkpoint).layers
    assert wanted_sets(index) == (keep_ratio, compensated)
    assert wanted_sets(index, compensated=False) == (0.8 if compensated else keep_ratio, False)
    assert wanted_sets(index, 0.5) == (0.5, True)  # who names a keep ratio has not asked for the profile
    assert bool(IndexSets(index).of_corpus().compensation) == compensated
    (chosen,) = make_predictor("similarity", layers, index, fallback="none").select(
        ["Tell me of stars."], None, n_rows=1
    )
    assert bool(chosen.compensation) == compensated
    (named,) = make_predictor("similarity", layers, index, keep_ratio=0.5, fallback="none").select(
        ["Tell me."], None, n_rows=1
    )
    assert named.compensation
    assert (make_predictor("similarity", layers, index).alpha is None) == compensated  # hybrid for unfamiliar prompts
    shown = CliRunner().invoke(main, ["info", str(copy)])
    kind = "compensated sets" if compensated else "plain sets"
    words = f"{kind}, keep ratio {keep_ratio:g}: perplexity +0.0%" if keep_ratio < 1 else "no gain"
    assert f"balanced  {words}" in shown.output
    run = ["generate", "Tell me of stars.", "--index", str(copy), "--model", tiny_checkpoint, "--json"]
    for budget in ([], ["--memory-budget", "8GiB"]):  # it counts all that the tests hold
        done = CliRunner().invoke(main, [*run, *budget, "--max-new-tokens", "2"])
        assert done.exit_code == 0, done.stderr


def test_manifests_of_earlier_releases_are_read(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "index")
    path = copy / "manifest.json"
    SemanticIndex.load(copy).write_profiles({"balanced": ProfileInfo(0.5, True, 0.1, 1.0, 1.0, 1.0, 1, 10)})
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["profile"] = manifest.pop("profiles")["balanced"]
    for name in ("compensated", "total_bytes", "dense_total_bytes"):
        del manifest["profile"][name]
    for entry in manifest["compensation"]:
        del entry["plain"]
        entry |= {"rank": None, "bypass_rank": 0, "distil_from": "joint"}
    path.write_text(json.dumps({**manifest, "sha256": manifest_checksum(manifest)}), encoding="utf-8")
    loaded = SemanticIndex.load(copy).manifest
    assert loaded.profiles.keys() == {"balanced"} and loaded.profile.gain is None
    assert loaded.profile.compensated and not loaded.compensation[0].plain
    manifest["profile"] |= {"keep_ratio": 0.6, "compensated": True}
    path.write_text(json.dumps({**manifest, "sha256": manifest_checksum(manifest)}), encoding="utf-8")
    with pytest.raises(IndexFormatError, match=r"profile.keep_ratio is 0.6, of which there are no compensated sets"):
        SemanticIndex.load(copy)


def test_a_copy_of_one_layer_does_not_hold_on_to_its_file(built, tiny_checkpoint):
    d_model = load_model(tiny_checkpoint).layers[0].d_model
    _, repairs = load_compensated(built / compensation_file(0.5, 0), d_model, N_LAYERS)
    copied = repairs[0].to("cpu", copy=True)
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in vars(copied).values())


def call(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def asked(built, tiny_checkpoint, tmp_path):
    """A copy of the index, and what evaluate and tune are asked about it: ten rows."""
    copy = shutil.copytree(built, tmp_path / "index")
    rows = [f"Tell me of stars, {i}." for i in range(10)]
    return copy, [write_rows(tmp_path / "rows.jsonl", rows), "--index", copy, "--model", tiny_checkpoint, "--json"]


def write_rows(path, prompts):
    """Write rows of these prompts for evaluate."""
    rows = [
        {"id": str(i), "prompt": prompt, "completion": f"They are {i % 10} and more."}
        for i, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


WIDE = ["--keep-ratio", "0.7", "--max-perplexity-increase", "1e-9"]
"""For tune: chance favours the narrower sets of a random model."""


ANY = ["--max-perplexity-increase", "9000%", "--max-perplexity-increase", "fast=9000%"]


def test_tune_tries_compensated_sets(asked):
    index, arguments = asked
    ratios = ["--keep-ratio", "0.5", "--keep-ratio", "0.7"]
    arguments = [*arguments, "--part", "0:100"]
    tuned = call("tune", *arguments, *ratios, *ANY)
    assert tuned.exit_code == 0, tuned.stderr
    assert json.loads(tuned.stdout)["profiles"]["balanced"]["keep_ratio"] == 0.5
    assert wanted_sets(SemanticIndex.load(index))[0] == 0.5
    strict = call("tune", *arguments, *WIDE)
    assert strict.exit_code == 0 and wanted_sets(SemanticIndex.load(index)) == (1.0, False)
    names = {row["contender"] for row in json.loads(strict.stdout)["contenders"]}
    assert names == {"similarity/compensated else global 0.7", "similarity/energy else hybrid 0.7", "dense 16bit"}
    few = call("tune", *arguments, "--limit", "9")
    assert few.exit_code == 1 and "there are 9 rows to tune on, expected 10 or more" in few.stderr
    assert call("tune", *arguments, "--keep-ratio", "1").exit_code == 1


def test_tune_goes_on_from_its_log_whatever_the_profile_is_now(asked, tmp_path):
    _, arguments = asked
    log = tmp_path / "log.jsonl"
    arguments = [*arguments, "--part", "0:100"]
    logged = call("tune", *arguments, "--log", log, *ANY)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert logged.exit_code == 0 and len(lines) > 10
    again = call("tune", *arguments, "--log", log, *WIDE)
    assert json.loads(again.stdout)["profiles"]["balanced"]["keep_ratio"] == 1.0
    assert log.read_text(encoding="utf-8").splitlines() == lines
    nowhere = call("tune", *arguments, "--log", tmp_path / "none" / "log.jsonl")
    assert nowhere.exit_code == 1 and "there is no folder" in nowhere.stderr


def test_evaluate_knows_compensated_sets(asked):
    _, arguments = asked
    scores = ["--score", "energy", "--score", "compensated", "--keep-ratio", "0.5", "--weights", "q8_0"]
    evaluated = call("evaluate", *arguments, *scores, "--contender", "similarity")
    assert evaluated.exit_code == 0, evaluated.stderr
    plain, fitted = json.loads(evaluated.stdout)
    assert plain["contender"] == "similarity/energy 0.5 q8_0"
    assert fitted["contender"] == "similarity/compensated 0.5 q8_0"
    assert fitted["kl"] < plain["kl"]
    unasked = call("evaluate", *arguments, "--limit", "1")
    names = {row["contender"] for row in json.loads(unasked.stdout)}
    ways = {f"{name}/{score} {ratio}" for name in ("global", "similarity", "random-cluster")
            for score in ("energy", "compensated") for ratio in (0.5, 0.7)}  # fmt: skip
    assert ways | {"dense 16bit", "dense int8", "dense q4_0", "griffin 0.5", "oracle 0.7"} <= names
    missing = call("evaluate", *arguments, "--score", "compensated", "--keep-ratio", "0.6", "--contender", "global")
    assert missing.exit_code == 1 and "no sets compensated at keep ratio 0.6" in missing.stderr


@pytest.mark.parametrize(("ratio", "noted"), [("0.6", True), ("0.5", False)])
def test_a_keep_ratio_without_compensated_sets_is_noted(built, tiny_checkpoint, ratio, noted):
    note = "compensated sets at 0.5, 0.7, not at 0.6"
    given = ["--index", built, "--model", tiny_checkpoint, "--keep-ratio", ratio]
    answer = call("generate", "stars", *given, "--max-new-tokens", "2")
    assert answer.exit_code == 0 and (note in answer.stderr) == noted
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that serving ends before it begins
        answer = call("serve", *given, "--port", taken.getsockname()[1])
    assert answer.exit_code == 1 and "cannot be opened" in answer.stderr
    assert (note in answer.stderr) == noted


def test_info_verify_and_lookup_know_compensated_sets(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "index")
    assert "keep ratio 0.5, sensitivity budget" in call("info", copy).stdout
    assert "compensated" in call("lookup", copy, "stars", "--keep-ratio", "0.5").stdout
    assert call("verify", copy).exit_code == 0
    damaged = copy / compensation_file(0.7, 0)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.unlink()  # a set that the corpus's serves better is a link to that one
    damaged.write_bytes(content)
    refused = call("verify", copy)
    assert refused.exit_code == 1 and "the file is damaged" in refused.stderr
