"""llama.cpp on exported sets gives the tokens that our own runtime gives."""

from __future__ import annotations

import json

import pytest
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.errors import ConfigError, ContextLengthError, PromptError, UnknownModeError
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
        assert [path.name for path in generator.engine.pool.paths] == [run.model]


def test_what_llama_cpp_cannot_do_is_refused(wide_index, exported, tmp_path):
    with pytest.raises(UnknownModeError, match="expected similarity, global or dense"):
        LlamaCppGenerator(wide_index, exported, mode="stability")
    with pytest.raises(ConfigError, match="depend on the prompt"):
        LlamaCppGenerator(wide_index, exported, fallback="hybrid")
    with pytest.raises(ConfigError, match="prefill is 'some'"):
        LlamaCppGenerator(wide_index, exported, prefill="some")


def test_bad_prompts_are_refused(wide_index, exported):
    with LlamaCppGenerator(wide_index, exported, fallback="none", context=64) as generator:
        with pytest.raises(PromptError, match="is empty"):
            generator.generate("  ")
        with pytest.raises(ContextLengthError, match="exceed the context of 64"):
            generator.generate(PROMPTS[0] * 9, max_new_tokens=32)
        with pytest.raises(UnknownModeError, match="hybrid"):
            generator.generate(PROMPTS[0], mode="hybrid")
