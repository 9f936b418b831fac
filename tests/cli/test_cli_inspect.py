"""`coreinfer-sim show`, `info`, `lookup` and `check`."""

from __future__ import annotations

import re

import pytest
from commands import NOUNS, call, generated, parsed, refused, setting, succeeded

from coreinfer_sim.choosing.index_sets import IndexSets
from coreinfer_sim.index.index import SemanticIndex


def test_info(index, tiny_checkpoint):
    text = succeeded("info", index).stdout
    assert text.startswith(f"{index}: format version 2\n")
    assert f"{tiny_checkpoint} (llama, 3 layers, d_model 32, d_ff 48, float32)" in text
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


def test_show_is_info_and_with_a_prompt_lookup(index):
    assert succeeded("show", index).stdout == succeeded("info", index).stdout
    assert parsed("show", index) == parsed("info", index)
    assert succeeded("show", index, "comets", "-k", 2).stdout == succeeded("lookup", index, "comets", "-k", 2).stdout


def test_check(index, tiny_checkpoint):
    assert re.match(rf"{index} is valid: format version, .*checksums, encoder\n", succeeded("check", index).stdout)
    assert succeeded("verify", index).stdout == succeeded("check", index).stdout  # its former name
    found = parsed("check", index, "--model", tiny_checkpoint)
    assert found["index"] == str(index) and found["valid"] is True
    assert {"checksums", "encoder", "sampled model weights", "tokenizer"} <= set(found["checked"])


def test_lookup(index):
    text = succeeded("lookup", index, "Where do comets come from?", "-k", 2).stdout
    first, second, *rest = text.splitlines()
    assert re.match(r" +0\.\d{3}  cluster +\d  .*space", first) and "space" not in second
    assert len(rest) == 1 and re.match(r"core neurons of cluster \d: 24 of 48 in each of 3 layers", rest[0])


def test_core_neurons_are_shown_where_the_profile_is_dense(encoder):
    """The ready-made index promises nothing but dense decode, in which no neuron is chosen."""
    assert SemanticIndex.load("demo").manifest.profile.is_dense
    text = succeeded("show", "demo", "How do stars form?").stdout
    assert text.endswith("core neurons of cluster 1: 1228 of 1536 in each of 30 layers\n")
    assert len(parsed("show", "demo", "How do stars form?")["core_neurons"]["0"]) == 1228
    whole = succeeded("lookup", "demo", "How do stars form?", "--keep-ratio", 1).stdout
    assert whole.endswith("core neurons of cluster 1: all 1536 of every layer\n")


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
    for layer, ids in IndexSets(loaded, 0.25, layers="1:").of_cluster(best).ids.items():
        assert len(ids) == 12 and found["core_neurons"][str(layer)] == ids.tolist()
    paper = parsed("lookup", index, "comets", "--keep-ratio", 0.25, "--score", "paper")["core_neurons"]
    assert paper["1"] == IndexSets(loaded, 0.25, "paper").of_cluster(best).ids[1].tolist() != found["core_neurons"]["1"]


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
    assert "layer" not in short.rpartition("layers")[2]


def test_an_index_over_some_layers_can_be_looked_into(build, tmp_path):
    assert build("--clusters", 2, *setting("build.layers", "1:2")).exit_code == 0
    out = tmp_path / "out" / "index"
    assert set(parsed("lookup", out, "comets")["core_neurons"]) == {"1"}
    assert "layers 1\n" in succeeded("info", out).stdout
    refused(call("lookup", out, "comets", "--layers", "0:2"), r"layers \[0\] were not recorded")
    for mode in ("similarity", "global", "hybrid", "stability", "random"):  # two of three layers are dense
        found = generated(out, "--keep-ratio", 0.5, "--mode", mode, "--max-new-tokens", 2)
        assert found["keep_ratio"] == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-3)


@pytest.mark.parametrize("options", [["--layers", "9:"], ["--layers", "::0"], ["--keep-ratio", "7"]], ids=" ".join)
def test_settings_of_lookup_that_cannot_be_met(index, options):
    refused(call("lookup", index, "stars", *options), "layers|keep ratio")
