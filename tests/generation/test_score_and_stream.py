"""Streams yield what `generate` writes; scores are those of decoding token by token."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch
from tiny_models import save_tiny_checkpoint
from transformers import DynamicCache

from coreinfer_sim.base.decode_settings import DecodeConfig, SelectionConfig
from coreinfer_sim.base.errors import (
    ConfigError,
    ContextLengthError,
    GenerationCancelledError,
    PromptError,
    SamplingError,
    UnknownModeError,
)
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.models.loading import load_model

PROMPT = "How do stars form?"
COMPLETION = " Clouds of gas and dust collapse."


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


def generator_of(language_model, engine="auto", prefill="dense", mode="random"):
    selection = SelectionConfig(mode=mode, keep_ratio=0.5)
    return TextGenerator(language_model, None, selection, DecodeConfig(engine=engine, prefill=prefill))


@pytest.fixture
def generator(language_model):
    return generator_of(language_model)


@pytest.fixture
def passes(language_model):
    """Notes of forward passes."""
    noted = []
    hook = language_model.model.register_forward_hook(lambda *_: noted.append(1))
    yield noted
    hook.remove()


def streaming_threads():
    return [thread for thread in threading.enumerate() if thread.name == "coreinfer-sim-stream"]


# --- streams --------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_stream_join_to_the_text(generator):
    whole = generator.generate(PROMPT, max_new_tokens=60)
    pieces = list(generator.stream(PROMPT, max_new_tokens=60))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1 and all(pieces)
    chat = generator.generate(PROMPT, chat=True, mode="dense", max_new_tokens=20)
    assert "".join(generator.stream(PROMPT, chat=True, mode="dense", max_new_tokens=20)) == chat.text != whole.text
    assert not streaming_threads()


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_leaving_the_loop_ends_the_generation(language_model, passes, engine):
    generator = generator_of(language_model, engine)
    expected = generator.generate(PROMPT, max_new_tokens=8).text
    passes.clear()
    for piece in generator.stream(PROMPT, max_new_tokens=900):
        assert expected.startswith(piece)
        break
    assert not streaming_threads()
    assert len(passes) < 500
    assert generator.generate(PROMPT, max_new_tokens=8).text == expected  # nothing is locked, nothing left behind


def test_an_error_in_the_loop_ends_the_generation(generator):
    with pytest.raises(ZeroDivisionError):
        for _piece in generator.stream(PROMPT, max_new_tokens=900):
            raise ZeroDivisionError
    assert generator.generate(PROMPT, max_new_tokens=2).n_new_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, PromptError),
        (PROMPT, {"max_new_tokens": 5000}, ContextLengthError),
        (PROMPT, {"mode": "no-such"}, UnknownModeError),
        (PROMPT, {"max_new_tokens": 0}, ConfigError),
    ],
    ids=["prompt", "length", "mode", "setting"],
)
def test_errors_are_raised_where_the_text_is_read(generator, prompt, options, error):
    with pytest.raises(error):
        next(generator.stream(prompt, **options))
    assert not streaming_threads()


def test_an_error_while_tokens_come_is_raised_after_them(language_model, generator):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 30:
            raise ZeroDivisionError

    hook = language_model.model.lm_head.register_forward_hook(fail)
    pieces = []
    try:
        with pytest.raises(ZeroDivisionError):
            for piece in generator_of(language_model, "transformers").stream(PROMPT, max_new_tokens=60):
                pieces.append(piece)
    finally:
        hook.remove()
    assert pieces and generator.generate(PROMPT, max_new_tokens=60).text.startswith("".join(pieces))


def test_asyncio_reads_the_same_stream(generator):
    """Two at a time, one of which waits for the other."""

    async def read(**options):
        return [piece async for piece in generator.astream(PROMPT, **options)]

    async def both():
        return await asyncio.gather(read(max_new_tokens=40), read(max_new_tokens=20, chat=True))

    long, chat = asyncio.run(both())
    assert "".join(long) == generator.generate(PROMPT, max_new_tokens=40).text and len(long) > 1
    assert "".join(chat) == generator.generate(PROMPT, max_new_tokens=20, chat=True).text
    with pytest.raises(ContextLengthError):
        asyncio.run(read(max_new_tokens=5000))
    assert not streaming_threads()


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_who_cancels_an_asynchronous_stream_ends_the_generation(language_model, passes, how):
    generator = generator_of(language_model, "transformers")
    expected = generator.generate(PROMPT, max_new_tokens=8).text
    passes.clear()

    async def read(first):
        stream = generator.astream(PROMPT, max_new_tokens=900)
        async with contextlib.aclosing(stream):
            async for piece in stream:
                if not first.done():
                    first.set_result(piece)
                if how == "left":
                    break

    async def leave():
        first = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(read(first))
        piece = await first
        if how == "cancelled":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() == (how == "cancelled")
        return piece

    assert expected.startswith(asyncio.run(leave()))
    assert not streaming_threads() and len(passes) < 500
    assert generator.generate(PROMPT, max_new_tokens=8).text == expected


def test_a_call_that_waits_for_another_can_be_cancelled(generator):
    stream = generator.stream(PROMPT, max_new_tokens=900)
    next(stream)
    with pytest.raises(GenerationCancelledError):
        generator.generate(PROMPT, max_new_tokens=2, cancelled=lambda: True)
    stream.close()
    assert generator.generate(PROMPT, max_new_tokens=2).n_new_tokens == 2


# --- scores ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores_by_hand(language_model, chosen, sparse_prefill=False):
    """Read the prompt, then feed the completion token by token through compact MLPs."""
    tokenizer, model = language_model.tokenizer, language_model.model
    new = tokenizer(COMPLETION, add_special_tokens=False)["input_ids"]
    cache = DynamicCache(config=model.config)

    def read(ids):
        output = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return torch.log_softmax(output.logits[0, -1], -1)

    def steps():
        return [read([token]) for token in new[:-1]]

    prompt = tokenizer(PROMPT)["input_ids"]
    if sparse_prefill:
        with installed(language_model.layers, chosen):
            found = [read(prompt), *steps()]
    else:
        found = [read(prompt)]
        with installed(language_model.layers, chosen):
            found += steps()
    return [float(each[token]) for each, token in zip(found, new, strict=True)]


@pytest.mark.parametrize("engine", ["lean", "transformers"])
@pytest.mark.parametrize("mode", ["random", "stability", "dense"])
def test_scores_are_those_of_single_steps(language_model, engine, mode):
    generator = generator_of(language_model, engine, mode=mode)
    found = generator.score(PROMPT, COMPLETION)
    chosen = generator.generate(PROMPT, max_new_tokens=1).selection
    assert chosen.mode == mode
    assert found == pytest.approx(scores_by_hand(language_model, chosen), abs=1e-4)
    assert len(found) > 5 and all(value < 0 for value in found)
    assert generator_of(language_model, engine).score(PROMPT, COMPLETION, mode=mode) == pytest.approx(found)


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_scores_behind_a_sparse_prefill(language_model, engine):
    generator = generator_of(language_model, engine, prefill="sparse")
    chosen = generator.generate(PROMPT, max_new_tokens=1).selection
    expected = scores_by_hand(language_model, chosen, sparse_prefill=True)
    assert generator.score(PROMPT, COMPLETION) == pytest.approx(expected, abs=1e-4)
    assert generator_of(language_model, engine).score(PROMPT, COMPLETION)[0] != pytest.approx(expected[0], abs=1e-4)


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_short_completions(language_model, engine):
    generator, tokenizer = generator_of(language_model, engine), language_model.tokenizer
    first = tokenizer.decode(tokenizer(COMPLETION, add_special_tokens=False)["input_ids"][:1])
    assert generator.score(PROMPT, first) == pytest.approx(generator.score(PROMPT, COMPLETION)[:1])
    assert generator.score(PROMPT, "") == []


def test_what_a_score_refuses(tmp_path, generator):
    with pytest.raises(UnknownModeError, match="the mode is 'no-such', expected one of random, similarity"):
        generator.score(PROMPT, COMPLETION, mode="no-such")
    short = load_model(save_tiny_checkpoint(tmp_path / "short", max_position_embeddings=16))
    with pytest.raises(ContextLengthError, match="context is 16"):
        generator_of(short).score(PROMPT, COMPLETION)


# --- what else a generator offers -----------------------------------------------------------------------------------


def test_modes_by_call(generator):
    assert generator.modes[0] == "random" and "dense" in generator.modes
    dense = generator.generate(PROMPT, mode="dense", max_new_tokens=4)
    assert (dense.selection.mode, dense.keep_ratio) == ("dense", 1.0)
    with pytest.raises(UnknownModeError, match="the mode is 'no-such'"):
        generator.generate(PROMPT, mode="no-such")
    with pytest.raises(ConfigError, match="needs an index"):
        generator.generate(PROMPT, mode="similarity")


def test_a_generator_without_an_index_looks_nothing_up(generator):
    with pytest.raises(ConfigError, match="no index to look prompts up in"):
        generator.lookup(PROMPT)


def test_a_seed_makes_samples_reproducible(generator):
    once, again, other = (
        generator.generate(PROMPT, max_new_tokens=12, temperature=1.5, seed=seed).token_ids for seed in (1, 1, 2)
    )
    assert once == again != other
    greedy = generator.generate(PROMPT, max_new_tokens=12)
    assert generator.generate(PROMPT, max_new_tokens=12, temperature=0, top_p=0.5).token_ids == greedy.token_ids


def test_a_text_may_be_shortened_to_the_context(tmp_path):
    generator = generator_of(load_model(save_tiny_checkpoint(tmp_path / "short", max_position_embeddings=40)))
    run = generator.generate(PROMPT, max_new_tokens=100, min_new_tokens=100, shorten=True)
    assert run.n_prompt_tokens + run.n_new_tokens == 40


def test_settings_that_transformers_refuses(language_model, generator, monkeypatch):
    monkeypatch.setattr(language_model.model.generation_config, "bad_words_ids", [])
    with pytest.raises(SamplingError, match="transformers refused the settings .*bad_words_ids"):
        generator.generate(PROMPT, max_new_tokens=4)
