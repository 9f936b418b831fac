"""`coreinfer-sim generate`: what each mode gives, and what it says of it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from commands import MODES, NOUNS, call, generated, parsed, refused, setting, succeeded

FIELDS = {
    *(
        "prompt",
        "text",
        "mode",
        "cluster",
        "label",
        "similarity",
        "keep_ratio",
        "n_prompt_tokens",
        "n_cached_tokens",
        "n_new_tokens",
    ),
    "read_ratio",
    "skips_zeros",
    *(
        "engine",
        "file",
        "ended",
        "lookup_seconds",
        "prepare_seconds",
        "prefill_seconds",
        "decode_seconds",
        "tokens_per_second",
        "mlp_bytes_per_token",
        "dense_mlp_bytes_per_token",
        "total_bytes_per_token",
        "disk_bytes_per_token",
        "found_ratio",
    ),
    *("confidence", "confident"),
}


def test_options_that_a_mode_does_not_look_at_are_named(index):
    options = ("generate", "stars", "--index", index, "--max-new-tokens", 2)
    done = succeeded(*options, "--mode", "dense", *setting("select.score", "paper"), "--keep-ratio", 0.4)
    for name in ("score", "keep_ratio"):
        assert f"Note: {name} has no effect in mode dense.\n" in done.stderr
    assert "Note" not in succeeded(*options, *setting("select.fallback", "none")).stderr


@pytest.mark.parametrize("mode", MODES)
def test_generate_in_every_mode(index, mode):
    keep = ["--keep-ratio", 0.5] if mode == "similarity" else []  # else it is dense, as nothing is promised
    found = generated(index, "--mode", mode, *keep, *setting("select.fallback", "none"))
    assert set(found) == FIELDS
    assert found["mode"] == mode and found["n_new_tokens"] == 8 and found["prompt"] == "How do stars form?"
    assert (
        found["keep_ratio"] == found["read_ratio"] == (1.0 if mode in ("all", "dense") else 0.5)
    )  # the γ of the index
    routed = mode in ("similarity", "hybrid")
    assert [found[name] is not None for name in ("cluster", "confidence", "confident")] == [routed] * 3
    if routed:
        assert "space" in found["label"] and 0 < found["similarity"] <= 1 and 0 <= found["confidence"] <= 1
    assert found["dense_mlp_bytes_per_token"] == 3 * 3 * 32 * 48 * 4
    assert found["mlp_bytes_per_token"] == found["dense_mlp_bytes_per_token"] * found["keep_ratio"]

    text = succeeded(
        *("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, "--mode", mode),
        *([*keep, *setting("select.fallback", "none")] if mode == "similarity" else ()),
    )
    assert text.stdout == f"> How do stars form?\n{found['text']}\n"
    assert re.match(
        rf"  {mode} · .*holds {found['keep_ratio']:.2f} · engine lean · 8 tokens at [\d.]+ tokens/s · reads",
        text.stderr,
    )


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_at_keep_ratio_1(index, mode, dense_text):
    assert generated(index, "--mode", mode, "--keep-ratio", 1.0)["text"] == dense_text


def test_keep_ratio_score_and_layers_change_what_is_kept(index, dense_text):
    assert generated(index, "--keep-ratio", 0.25)["keep_ratio"] == 0.25
    assert generated(index, "--keep-ratio", 0.25, *setting("select.sparse_layers", "1:"))["keep_ratio"] == 0.5
    texts = {
        generated(index, "--keep-ratio", 0.2, *more)["text"]
        for more in ([], setting("select.score", "paper"), setting("select.sparse_layers", 2))
    }
    assert len(texts | {dense_text}) == 4


@pytest.mark.parametrize("fallback", [None, "hybrid", "dense", "global", "none"])
def test_what_an_unfamiliar_prompt_gets(index, fallback):
    options = ["--keep-ratio", 0.5, *([] if fallback is None else setting("select.fallback", fallback))]
    found = generated(index, *options, prompt="zzz qqq 0x3f")
    mode = {None: "hybrid", "none": "similarity"}.get(fallback, fallback)
    assert (found["mode"], found["confident"]) == (mode, False) and found["confidence"] < 0.05
    assert found["cluster"] is not None
    plain = "--keep-ratio", 0.5, *setting("select.fallback", "none")
    other = generated(index, "--mode", mode, *plain, prompt="zzz qqq 0x3f")
    assert found["text"] == other["text"] and found["keep_ratio"] == other["keep_ratio"]
    text = succeeded("generate", "zzz qqq 0x3f", "--index", index, "--max-new-tokens", 2, *options).stderr
    assert re.match(rf"  {mode} · cluster .* · unfamiliar prompt · ", text)
    familiar = generated(index, *options, prompt=f"What do {NOUNS[0]} tell us about space, case 0?")
    assert (familiar["mode"], familiar["confident"]) == ("similarity", True)


def test_modes_without_an_index(tiny_checkpoint):
    for mode in ("stability", "random", "dense"):
        found = parsed(
            "generate", "stars", "--model", tiny_checkpoint, "--mode", mode, "--keep-ratio", 0.5, "--max-new-tokens", 2
        )
        assert found["mode"] == mode
    plain = call("generate", "stars", "--model", tiny_checkpoint, "--max-new-tokens", 2, "--json")
    assert json.loads(plain.stdout)["mode"] == "dense" and "Decode is dense, as there is no index" in plain.stderr
    for mode in ("similarity", "hybrid", "global"):
        refused(
            call("generate", "stars", "--model", tiny_checkpoint, "--mode", mode, "--keep-ratio", 0.5),
            "needs an index",
            "build-index",
        )
    refused(call("generate", "stars", "--model", tiny_checkpoint, "--mode", "random"), "give a keep ratio")


def test_compare_decodes_densely_too(index, dense_text):
    keep = "--keep-ratio", 0.5
    sparse, dense = generated(index, *keep, "--compare")
    assert sparse == {**generated(index, *keep), **{name: sparse[name] for name in sparse if "second" in name}}
    assert (dense["mode"], dense["text"], dense["cluster"]) == ("dense", dense_text, None)
    text = succeeded("generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, *keep, "--compare")
    assert re.search(rf"^> How do stars form\?\n\[similarity\]\n.*\n  {sparse['mode']} · ", text.stdout)
    assert f"\n[dense]\n{dense_text}\n  dense · holds 1.00 · engine lean · 8 tokens" in text.stdout
    assert text.stderr == ""
    assert (
        len(succeeded("generate", "x", "--index", index, "--compare", "--mode", "dense").stdout.split("[dense]")) == 2
    )


@pytest.mark.parametrize("source", ["file", "stdin"])
@pytest.mark.parametrize("compare", [False, True])
def test_lines_are_prompts(index, tmp_path, source, compare):
    lines = "How do stars form?\n\n  Why does bread rise?  \r\nWas ist ein Gebäude?"
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    where = {"file": (["--file", tmp_path / "prompts.txt"], ""), "stdin": ([], lines)}[source]
    arguments = [
        "generate",
        "--index",
        index,
        *setting("select.fallback", "none"),
        "--max-new-tokens",
        4,
        *where[0],
        *(["--compare"] if compare else []),
    ]
    rows = parsed(*arguments, stdin=where[1])
    prompts = ["How do stars form?", "Why does bread rise?", "Was ist ein Gebäude?"]
    assert [(row[0] if compare else row)["prompt"] for row in rows] == prompts
    assert all([run["mode"] for run in row] == ["similarity", "dense"] for row in rows) if compare else True
    text = succeeded(*arguments, stdin=where[1]).stdout
    assert [line[2:] for line in text.splitlines() if line.startswith("> ")] == prompts


def test_one_line_in_a_file_is_still_a_list(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("stars\n", encoding="utf-8")
    (row,) = parsed("generate", "--index", index, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 2)
    assert row["prompt"] == "stars"


def test_a_line_that_fails_does_not_take_the_others_along(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("stars\n" + "stars " * 2000 + "\nbread\n", encoding="utf-8")
    given = "--index", index, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 2, "--keep-ratio", 0.5
    result = call("generate", *given, "--json")
    assert result.exit_code == 1
    assert [row["prompt"] for row in json.loads(result.stdout)] == ["stars", "bread"]
    read, first, last = result.stderr.splitlines()
    assert (
        read.startswith("Reading ")
        and first.startswith("Error: line 2: the prompt has ")
        and last.startswith("Error: 1 of 3 prompts failed")
    )


def test_sampling_repeats_with_its_seed(index):
    drawn = [generated(index, "--temperature", 2.0, *setting("sample.seed", seed))["text"] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert (
        generated(index, *setting("sample.seed", 1))["text"] == generated(index, *setting("sample.seed", 2))["text"]
    )  # greedy


@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("top_p", 1e-6), ("min_p", 1.0)])
def test_sampling_among_one_token_is_greedy(index, name, value):
    assert (
        generated(index, *setting(f"sample.{name}", value), *setting("sample.seed", 3))["text"]
        == generated(index)["text"]
    )


@pytest.mark.parametrize(
    "options",
    [
        setting("sample.typical_p", 0.5),
        [
            *(
                part
                for name, value in {"top_p": 0.9, "top_k": 5, "min_p": 0.05}.items()
                for part in setting(f"sample.{name}", value)
            ),
            *("--temperature", 0.7),
        ],
        setting("sample.num_beams", 3),
        [*setting("sample.num_beams", 2), "--temperature", 1.5],
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["similarity", "stability"])
def test_sampling_and_beams(index, options, mode):
    found = generated(index, "--mode", mode, *options)
    assert found["n_new_tokens"] == 8 and found["text"]
    assert found == {**generated(index, "--mode", mode, *options), **{k: v for k, v in found.items() if "second" in k}}


def test_beams_show_their_text_at_the_end(index):
    found = generated(index, *setting("sample.num_beams", 3))
    text = succeeded(
        "generate", "How do stars form?", "--index", index, "--max-new-tokens", 8, *setting("sample.num_beams", 3)
    )
    assert text.stdout == f"> How do stars form?\n{found['text']}\n"


def test_penalties_and_stops(index):
    plain = generated(index, "--max-new-tokens", 40)["text"]
    assert generated(index, "--max-new-tokens", 40, *setting("sample.repetition_penalty", 5.0))["text"] != plain
    free = generated(index, "--max-new-tokens", 40, *setting("sample.no_repeat_ngram_size", 1))["text"]
    assert free != plain
    stopped = generated(index, "--max-new-tokens", 40, "--stop", plain[3:5])
    assert stopped["n_new_tokens"] < 40 and plain.startswith(stopped["text"])
    assert generated(index, "--max-new-tokens", 5, *setting("sample.min_new_tokens", 5))["n_new_tokens"] == 5


def test_chat_uses_the_models_template(index):
    plain, chat = generated(index), generated(index, "--chat")
    system = generated(index, "--chat", "--system", "Answer briefly.")
    assert plain["n_prompt_tokens"] < chat["n_prompt_tokens"] < system["n_prompt_tokens"]
    assert plain["text"] != chat["text"]
    assert chat["prompt"] == "How do stars form?"  # routed by what the user said, not by the template
    assert chat["similarity"] == system["similarity"] == plain["similarity"]


def test_a_model_without_a_template_does_not_chat(index, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    (copy / "chat_template.jinja").unlink()
    refused(
        call("generate", "stars", "--index", index, "--model", copy, "--chat"), "has no chat template", "plain text"
    )


def test_without_a_promise_decode_is_dense_and_says_so(index, dense_text):
    assert generated(index)["text"] == dense_text
    found = generated(index, prompt=f"What do {NOUNS[0]} tell us about space, case 0?")
    assert (found["keep_ratio"], found["read_ratio"], found["mode"]) == (1.0, 1.0, "similarity")
    assert "space" in found["label"]  # it is looked up all the same
    said = succeeded("generate", "stars", "--index", index, "--max-new-tokens", 2).stderr
    assert "promises nothing yet; 'coreinfer-sim tune' measures" in said
    unfamiliar = generated(index, prompt="zzz qqq 0x3f")
    assert (unfamiliar["mode"], unfamiliar["keep_ratio"]) == ("dense", 1.0)
