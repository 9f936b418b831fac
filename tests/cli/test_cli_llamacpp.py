"""`coreinfer-sim generate --engine llamacpp`."""

from __future__ import annotations

import pytest
from commands import call, parsed, refused, setting, succeeded
from tiny_index import PROMPTS

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")


def test_the_command_runs_on_llama_cpp(wide_index, exported):
    given = ("generate", "--index", wide_index.name, "--engine", "llamacpp", *setting("decode.exported", exported))
    given += ("--max-new-tokens", 6, *setting("decode.context", 128))
    text = succeeded(*given, "--compare", PROMPTS[0]).stdout
    assert "[similarity]" in text and "engine llamacpp, cluster-" in text
    assert "engine llamacpp, dense.gguf · 6 tokens at " in text
    found = parsed(*given, "--temperature", 0.8, *setting("sample.top_k", 5), PROMPTS[0])
    assert (found["n_new_tokens"], found["engine"], found["keep_ratio"]) == (6, "llamacpp", None)
    assert (exported / found["file"]).is_file()
    sparse = parsed(*given, *setting("decode.prefill", "sparse"), *setting("decode.memory_limit", "1GiB"), PROMPTS[0])
    assert sparse["n_new_tokens"] == 6 and sparse["file"] == found["file"]


@pytest.mark.parametrize("more", [[], ["--stop", "o"], ["--chat", "--stop", "e", "--stop", "never"]], ids=str)
def test_json_has_the_text_that_streams(wide_index, exported, more):
    given = ("generate", "--index", wide_index.name, "--engine", "llamacpp", *setting("decode.exported", exported))
    given += ("--max-new-tokens", 24, "--temperature", 3.0, *setting("decode.context", 128), *more, PROMPTS[1])
    for seed in range(4):
        found = parsed(*given, *setting("sample.seed", seed))["text"]
        assert f"> {PROMPTS[1]}\n{found}\n" in succeeded(*given, *setting("sample.seed", seed)).stdout
        assert "</s>" not in found and not any(
            stop in found for stop in [more[i + 1] for i, name in enumerate(more) if name == "--stop"]
        )


def test_what_llama_cpp_has_not_is_refused(wide_index, exported):
    given = ("generate", "--index", wide_index.name, "--engine", "llamacpp", PROMPTS[0])
    refused(call(*given), "needs the models exported from the index")
    given += (*setting("decode.exported", exported),)
    refused(call(*given, *setting("sample.num_beams", 2)), "num_beams does not apply to the engine llamacpp")
    refused(call(*given, "--keep-ratio", 0.5), "keep_ratio does not apply to the engine llamacpp")
    refused(call(*given, *setting("decode.memory_limit", "lots")), "expected a size", code=2)
    refused(call(*given, "--mode", "hybrid"), "expected similarity, global or dense")


@pytest.mark.parametrize("name", ["context", "memory_limit"])
def test_what_is_of_llama_cpp_alone_is_refused_elsewhere(wide_index, exported, name):
    given = ("generate", "--index", wide_index.name, PROMPTS[0])
    refused(call(*given, *setting(f"decode.{name}", 640)), f"{name} is of the engine llamacpp")
    refused(call(*given, *setting("decode.exported", exported)), "exported is of the engine llamacpp")
