"""`coreinfer-sim generate --backend llamacpp`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from tiny_index import PROMPTS

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_runs_on_llama_cpp(wide_index, exported):
    given = ("generate", "--index", wide_index.name, "--backend", "llamacpp")
    given += ("--exported", exported, "--max-new-tokens", 6)
    result = run(*given, "--compare", "--context", 128, PROMPTS[0])
    assert result.exit_code == 0, result.output
    assert "dense.gguf, dense prefill" in result.stdout and "tokens/s" in result.stdout
    result = run(*given, "--json", "--temperature", 0.8, "--top-k", 5, "--memory-limit", "1GiB", PROMPTS[0])
    assert result.exit_code == 0 and json.loads(result.stdout)["n_new_tokens"] == 6
    result = run(*given, "--num-beams", 2, PROMPTS[0])
    assert result.exit_code == 2 and "does not apply to --backend llamacpp" in result.output
    assert run("generate", "--index", wide_index.name, "--context", 64, PROMPTS[0]).exit_code == 2
    result = run("generate", "--index", wide_index.name, "--backend", "llamacpp", PROMPTS[0])
    assert result.exit_code == 1 and "give --index and --exported" in result.output
    assert run(*given, "--memory-limit", "lots", PROMPTS[0]).exit_code == 1
