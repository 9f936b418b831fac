"""llama.cpp on exported sets gives the tokens that our own runtime gives, and opens no more than it may."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from coreinfer_sim_cli.main import main
from tiny_index import PROMPTS, WIDE_RATIO
from tiny_models import save_tiny_checkpoint

from coreinfer_sim.base.errors import ConfigError, GenerationError, ModelError, PromptError
from coreinfer_sim.base.settings import parse_size
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
from coreinfer_sim.generation.text import TextGenerator
from coreinfer_sim.models.loading import load_model

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")


def ours(wide_checkpoint, wide_index, mode, prompt, **options):
    lm = load_model(wide_checkpoint, "float32")
    predictor = make_predictor(mode, lm.layers, wide_index, keep_ratio=WIDE_RATIO, fallback="none")
    return TextGenerator(lm, predictor).generate(prompt, do_sample=False, **options)


@pytest.mark.parametrize("mode", ["similarity", "global", "dense"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_tokens_are_those_of_our_own_runtime(wide_checkpoint, wide_index, exported, mode, chat):
    with LlamaCppGenerator(wide_index, exported, mode=mode, fallback="none", context=256) as generator:
        for prompt in PROMPTS[:2]:
            expected = ours(wide_checkpoint, wide_index, mode, prompt, chat=chat, max_new_tokens=16)
            run = generator.generate(prompt, chat=chat, max_new_tokens=16)
            assert run.text == expected.text and run.n_new_tokens == len(expected.token_ids)
            written = []
            streamed = generator.generate(prompt, chat=chat, max_new_tokens=16, write=written.append)
            assert "".join(written) == streamed.text and streamed.n_new_tokens == run.n_new_tokens
            # Of broken UTF-8, such as random weights write, a stream of llama.cpp's leaves parts out.
            assert run.n_prompt_tokens == expected.n_prompt_tokens and run.prefill == "dense"
            assert (run.mode, run.cluster) == (mode, expected.selection.cluster)
            assert json.loads(json.dumps(run.as_dict()))["tokens_per_second"] > 0


def test_sparse_prefill_reads_the_prompt_with_the_cluster(wide_index, exported):
    with LlamaCppGenerator(wide_index, exported, prefill="sparse", fallback="none", context=256) as generator:
        run = generator.generate(PROMPTS[0], max_new_tokens=8)
        assert run.prefill == "sparse" and run.n_new_tokens == 8
        assert [path.name for path in generator.pool._open] == [run.model]


def test_the_pool_keeps_its_limit(wide_index, exported):
    size = (exported / "dense.gguf").stat().st_size
    with LlamaCppGenerator(
        wide_index, exported, fallback="none", context=256, memory_limit=int(2.1 * size)
    ) as generator:
        first = [generator.generate(prompt, max_new_tokens=4).text for prompt in PROMPTS]
        assert generator.pool.n_bytes <= 2.1 * size and exported / "dense.gguf" in generator.pool._open
        assert [generator.generate(prompt, max_new_tokens=4).text for prompt in PROMPTS] == first
    with (
        LlamaCppGenerator(wide_index, exported, fallback="none", context=256, memory_limit=size) as generator,
        pytest.raises(
            ConfigError, match=r"must be open at a time \(cluster-000\d.gguf beside dense.gguf\)|--prefill sparse"
        ),
    ):
        generator.generate(PROMPTS[0], max_new_tokens=4)


def test_what_llama_cpp_cannot_do_is_refused(wide_index, exported, tmp_path):
    with pytest.raises(ConfigError, match="expected similarity, global or dense"):
        LlamaCppGenerator(wide_index, exported, mode="stability")
    with pytest.raises(ConfigError, match="depend on the prompt"):
        LlamaCppGenerator(wide_index, exported, fallback="hybrid")
    with pytest.raises(ConfigError, match="has no router.json"):
        LlamaCppGenerator(wide_index, tmp_path)
    router = json.loads((exported / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**router, "dense": None}))
    with (
        pytest.raises(ConfigError, match="lacks dense"),
        LlamaCppGenerator(wide_index, tmp_path, fallback="none") as generator,
    ):
        generator.generate(PROMPTS[0])
    router["clusters"][0]["size"] += 1
    (tmp_path / "router.json").write_text(json.dumps(router))
    with pytest.raises(ConfigError, match="another index"):
        LlamaCppGenerator(wide_index, tmp_path)
    router["clusters"][0]["file"] = "../secret.gguf"
    router["clusters"][0]["size"] -= 1
    (tmp_path / "router.json").write_text(json.dumps(router))
    with pytest.raises(ConfigError, match="GGUF files beside it"):
        LlamaCppGenerator(wide_index, tmp_path)


def test_bad_prompts_and_bad_files(wide_index, exported, tmp_path):
    with LlamaCppGenerator(wide_index, exported, fallback="none", context=64) as generator:
        with pytest.raises(PromptError, match="is empty"):
            generator.generate("  ")
        with pytest.raises(PromptError, match="exceed the context of 64"):
            generator.generate(PROMPTS[0] * 9, max_new_tokens=32)
    (tmp_path / "router.json").write_text((exported / "router.json").read_text())
    with LlamaCppGenerator(wide_index, tmp_path, fallback="none", context=64) as generator:
        with pytest.raises(ModelError, match="there is no file"):
            generator.generate(PROMPTS[0], max_new_tokens=4)
        for path in exported.glob("*.gguf"):
            (tmp_path / path.name).write_bytes(b"no model")
        with pytest.raises(ModelError, match="llama.cpp cannot load"):
            generator.generate(PROMPTS[0], max_new_tokens=4)
    with pytest.raises(ConfigError, match="has 8 bytes, export wrote"):
        LlamaCppGenerator(wide_index, tmp_path, fallback="none", context=64)


def test_a_cache_of_another_shape_is_refused(wide_index, exported, tmp_path):
    other = load_model(save_tiny_checkpoint(tmp_path / "deep", intermediate_size=192, num_hidden_layers=2), "float32")
    from coreinfer_sim.choosing.selection import NeuronSelection
    from coreinfer_sim.export.compact import Source, compact_weights
    from coreinfer_sim.export.gguf import export_gguf

    for path in exported.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "dense.gguf").unlink()
    router = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").unlink()
    (tmp_path / "router.json").write_text(json.dumps({**router, "bytes": {}}))
    weights = compact_weights(other, NeuronSelection("dense"), one_width=False)
    export_gguf(other, weights, Source("m", "i", "s", "dense", 1.0, False, "f32"), tmp_path / "dense.gguf", "f32")
    with (
        LlamaCppGenerator(wide_index, tmp_path, fallback="none", context=64) as generator,
        pytest.raises(GenerationError, match="does not fit cluster-000"),
    ):
        generator.generate(PROMPTS[0], max_new_tokens=4)


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


@pytest.mark.parametrize(
    ("text", "expected"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5kb", 1500), ("77", 77), ("8B", 8)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 apples", "0"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="no size"):
        parse_size(text)
