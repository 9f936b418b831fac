"""What `coreinfer-sim generate` refuses: models, prompts and settings."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from commands import call, refused, setting
from tiny_models import save_tiny_checkpoint


def test_a_model_that_is_not_there(build, index, tmp_path):
    refused(
        call("generate", "stars", "--index", index, "--model", "/nowhere/model"), "/nowhere/model", "check the path"
    )
    refused(call("generate", "stars", "--index", index, "--model", "/nowhere/model.gguf"), "no file", "check the path")
    (tmp_path / "empty").mkdir()
    refused(
        call("generate", "stars", "--index", index, "--model", tmp_path / "empty"), "no config.json", "check the path"
    )


def test_weights_that_are_no_weights(index, tiny_checkpoint, tmp_path):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    refused(
        call("generate", "stars", "--index", index, "--model", broken),
        "no readable safetensors header",
        "fetch it again",
    )
    for n_bytes in (0, 2000):
        shutil.copy(f"{tiny_checkpoint}/model.safetensors", broken)
        os.truncate(broken / "model.safetensors", n_bytes)
        said = f"model.safetensors is cut off at {n_bytes:,} bytes, within its header"
        refused(call("generate", "stars", "--index", index, "--model", broken), said, "fetch it again")


def test_another_model_of_the_same_family(index, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    for command in (["generate", "stars", "--index", index], ["check", index]):
        refused(
            call(*command, "--model", other), r"\d+ of 96 sampled weights", "expected the same weights", "build-index"
        )


def test_another_shape_of_the_same_family(index, tmp_path):
    other = save_tiny_checkpoint(tmp_path / "other", num_hidden_layers=2)
    for command in (["generate", "stars", "--index", index], ["check", index]):
        refused(call(*command, "--model", other), "llama with 2 layers", "llama with 3 layers", "build-index")


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_the_same_model_with_another_tokenizer(index, tiny_checkpoint, tmp_path, command):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    one, two = (token for token, number in vocabulary.items() if number in (350, 360))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    arguments = ["verify", index] if command == "verify" else ["generate", "stars", "--index", index]
    refused(call(*arguments, "--model", other), "tokenizer")


def test_a_prompt_longer_than_the_models_context(index):
    result = call("generate", "stars " * 1000, "--index", index, "--max-new-tokens", 10)
    line = refused(
        result,
        r"the prompt has \d+ tokens, but the model's context is 1024, into which the answer has to fit too",
        "shorten the prompt",
    )
    assert int(re.search(r"has (\d+) tokens", line)[1]) > 1024
    refused(call("generate", "stars", "--index", index, "--max-new-tokens", 1024), r"at most 10\d\d\.$")


def test_no_prompt(index, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    refused(call("generate", "--index", index, stdin=""), "no prompt was given", "--file")
    refused(call("generate", "--index", index, "--file", tmp_path / "prompts.txt"), "prompts.txt is empty")
    refused(call("generate", " ", "--index", index), "the prompt is empty, expected some text")
    refused(call("lookup", index, " "), "the prompt is empty, expected some text")


def test_a_system_message_without_chat(index):
    refused(call("generate", "stars", "--index", index, "--system", "Be brief."), "--system was given without --chat")


BAD_GENERATE = [
    ["--keep-ratio", "0"],
    ["--keep-ratio", "1.5"],
    setting("select.sparse_layers", "x"),
    setting("select.sparse_layers", "::0"),
    setting("select.sparse_layers", "9:"),
    setting("model.device", "no-such-device"),
    setting("model.dtype", "int3"),
    setting("model.encoder", "/nowhere/encoder"),
    setting("sample.top_p", 1.5),
    ["--temperature", "nan"],
    ["--stop", ""],
    [*setting("sample.min_new_tokens", 9), "--max-new-tokens", "8"],
    [*setting("select.seed", 2**70), "--mode", "random"],
    setting("sample.seed", 2**70),
    pytest.param(
        setting("model.device", "cuda"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    ),
]


@pytest.mark.parametrize("options", BAD_GENERATE, ids=" ".join)
def test_settings_of_generate_that_cannot_be_met(index, options):
    result = call("generate", "stars", "--index", index, *options)
    refused(result, code=2 if result.exit_code == 2 else 1)


LATIN = "Was ist ein Gebäude?\n".encode("latin-1")


def test_a_file_in_another_encoding(index, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"stars\n" + LATIN)
    refused(
        call("generate", "--index", index, "--file", tmp_path / "latin.txt"), "latin.txt is not UTF-8", "convert it"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"stars\n" + LATIN, "stdin is not UTF-8: line 2"), ("stars\n".encode("utf-16-le"), "seems to be UTF-16")],
)
def test_lines_in_another_encoding(index, content, said):
    refused(call("generate", "--index", index, stdin=content), said, "convert it")


def test_lines_are_decoded_as_files_are(index):
    def prompts(content):
        result = call("generate", "--index", index, "--max-new-tokens", 1, "--json", stdin=content)
        return [row["prompt"] for row in json.loads(result.stdout)], result.stderr

    assert prompts(b"\xef\xbb\xbfstars\n")[0] == prompts("stars\n".encode("utf-16"))[0] == ["stars"]
    texts, said = prompts(b"stars\ncut \xe2\x82\n")
    assert (
        texts == ["stars", "cut \ufffd\ufffd"]
        and "stdin: 1 row with U+FFFD for what is no Unicode text (line 2)" in said
    )


def test_empty_rows_are_counted(index, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "stars"}\n{"prompt": ""}\n')
    result = call("generate", "--index", index, "--file", tmp_path / "rows.jsonl", "--max-new-tokens", 1)
    assert result.exit_code == 0 and "rows.jsonl: 1 empty row dropped." in result.stderr
