"""llama.cpp on exported sets gives the tokens that our own engines give."""

from __future__ import annotations

import json

import pytest
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.errors import ChatTemplateError, ConfigError, ContextLengthError, PromptError
from coreinfer_sim.generation.opening import load

pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")


def opened(wide_index, exported, **settings):
    settings = {"fallback": "none", "context": 256, **settings}
    return load(wide_index, engine="llamacpp", exported=str(exported), **settings)


@pytest.mark.parametrize("mode", ["similarity", "global", "dense"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_tokens_are_those_of_our_own_engines(wide_checkpoint, wide_index, exported, mode, chat):
    ours = load(wide_index, wide_checkpoint, mode=mode, keep_ratio=WIDE_RATIO, fallback="none", dtype="float32")
    with opened(wide_index, exported, mode=mode) as generator:
        for prompt in PROMPTS[:2]:
            expected = ours.generate(prompt, chat=chat, max_new_tokens=16)
            run = generator.generate(prompt, chat=chat, max_new_tokens=16)
            assert run.n_new_tokens == expected.n_new_tokens
            # Of broken UTF-8, such as random weights write, llama.cpp leaves out an end that may be half a character.
            found, sound = (text.replace("\ufffd", "") for text in (run.text, expected.text))
            assert sound.startswith(found) and len(sound) - len(found) < 4
            written = []
            streamed = generator.generate(prompt, chat=chat, max_new_tokens=16, write=written.append)
            assert "".join(written) == streamed.text == run.text and streamed.n_new_tokens == run.n_new_tokens
            assert run.n_prompt_tokens == expected.n_prompt_tokens and run.engine == "llamacpp"
            assert (run.selection.mode, run.selection.cluster) == (mode, expected.selection.cluster)
            assert json.loads(json.dumps(run.as_dict()))["tokens_per_second"] > 0


def test_scores_are_those_of_our_own_engines(wide_checkpoint, wide_index, exported):
    ours = load(wide_index, wide_checkpoint, keep_ratio=WIDE_RATIO, fallback="none", dtype="float32")
    with opened(wide_index, exported) as generator:
        expected = ours.score(PROMPTS[0] + "\n", "Stars form in clouds.")
        found = generator.score(PROMPTS[0] + "\n", "Stars form in clouds.")
    assert found == pytest.approx(expected, abs=2e-2)


def test_sparse_prefill_reads_the_prompt_with_the_cluster(wide_index, exported):
    with opened(wide_index, exported, prefill="sparse") as generator:
        run = generator.generate(PROMPTS[0], max_new_tokens=8)
        assert run.n_new_tokens == 8 and run.file is not None and run.file.endswith(".gguf")


def test_what_llama_cpp_cannot_do_is_refused(wide_index, exported):
    with pytest.raises(ConfigError, match="expected similarity, global or dense"):
        opened(wide_index, exported, mode="stability")
    with pytest.raises(ConfigError, match="depend on the prompt"):
        opened(wide_index, exported, fallback="hybrid")
    with pytest.raises(ConfigError, match="prefill is 'some'"):
        opened(wide_index, exported, prefill="some")
    for setting in ({"keep_ratio": 0.5}, {"weights": "int8"}, {"memory_budget": 1 << 30}):
        with pytest.raises(ConfigError, match="fixed by export"):
            opened(wide_index, exported, **setting)
    with pytest.raises(ConfigError, match="is of the engine llamacpp"):
        load(wide_index, exported=str(exported))


def test_bad_prompts_are_refused(wide_index, exported):
    with opened(wide_index, exported, context=64) as generator:
        with pytest.raises(PromptError, match="is empty"):
            generator.generate("  ")
        with pytest.raises(ContextLengthError, match="exceed the context of 64"):
            generator.generate(PROMPTS[0] * 9, max_new_tokens=32)
        with pytest.raises(ConfigError, match="hybrid"):
            generator.generate(PROMPTS[0], mode="hybrid")


@pytest.mark.parametrize("write", [None, lambda _piece: None], ids=["whole", "streamed"])
def test_the_end_token_is_no_text(wide_index, exported, write):
    with opened(wide_index, exported) as generator:
        runs = [
            generator.generate(PROMPTS[0], max_new_tokens=60, temperature=5.0, seed=seed, write=write)
            for seed in range(12)
        ]
    ended = [run for run in runs if run.ended]
    assert ended and all(run.n_new_tokens < 60 for run in ended)
    assert not any("</s>" in run.text for run in runs)


@pytest.mark.parametrize("n_stops", [1, 6, 100])
def test_a_text_ends_before_its_first_stop(wide_index, exported, n_stops):
    with opened(wide_index, exported) as generator:
        free = generator.generate(PROMPTS[1], max_new_tokens=16)
        for stop in (free.text[:1], free.text[3:5], free.text[-1:]):  # of the dense model's token, and at the limit
            stops = [*(f"never {number}" for number in range(n_stops - 1)), stop]
            written = []
            whole = generator.generate(PROMPTS[1], max_new_tokens=16, stop=stops)
            streamed = generator.generate(PROMPTS[1], max_new_tokens=16, stop=stops, write=written.append)
            assert whole.text == streamed.text == "".join(written) == free.text[: free.text.find(stop)]
            assert whole.ended and whole.n_new_tokens == streamed.n_new_tokens <= 16
        assert not generator.generate(PROMPTS[1], max_new_tokens=16, stop=["never"]).ended


def test_sampling_settings_reach_llama_cpp(wide_index, exported):
    with opened(wide_index, exported) as generator:
        greedy = generator.generate(PROMPTS[0], max_new_tokens=16)
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
            assert (
                generator.generate(PROMPTS[0], max_new_tokens=16, **{"temperature": 1.0, **narrow}).text == greedy.text
            )
        once, again, other = (
            generator.generate(PROMPTS[0], max_new_tokens=16, temperature=1.5, seed=seed).text for seed in (7, 7, 2**40)
        )
        assert once == again != other
        assert generator.generate(PROMPTS[0], max_new_tokens=4, temperature=1.0, top_k=10**30, seed=1).n_new_tokens == 4
        penalised = generator.generate(PROMPTS[0], max_new_tokens=40, repetition_penalty=5.0)
        assert penalised.text != generator.generate(PROMPTS[0], max_new_tokens=40).text


def test_a_template_that_the_files_lack_is_not_made_up(wide_index, exported, tmp_path):
    assert opened(wide_index, exported).has_chat_template
    for path in exported.iterdir():
        content = path.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_untitled")
        (tmp_path / path.name).write_bytes(content)
    with opened(wide_index, tmp_path) as generator:
        assert not generator.has_chat_template
        with pytest.raises(ChatTemplateError, match="has no chat template"):
            generator.generate(PROMPTS[0], chat=True)
        assert generator.generate(PROMPTS[0], max_new_tokens=2).n_new_tokens == 2
