"""A generation that nobody wants any more ends at once, in every phase and engine, and leaves nothing behind."""

from __future__ import annotations

import threading
import time

import pytest
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.errors import GenerationCancelledError
from coreinfer_sim.generation.opening import load

ENGINES = ["lean", "transformers", "llamacpp"]


@pytest.fixture(scope="module")
def generators(wide_index, wide_checkpoint, exported):
    made = {}
    for engine in ENGINES:
        if engine == "llamacpp":
            pytest.importorskip("xllamacpp", reason="needs the extra llamacpp")
            made[engine] = load(wide_index, fallback="none", engine=engine, exported=str(exported), context=1024)
        else:
            options = {"keep_ratio": WIDE_RATIO, "fallback": "none", "dtype": "float32"}
            made[engine] = load(wide_index, wide_checkpoint, engine=engine, **options)
    yield made
    for generator in made.values():
        generator.close()


@pytest.fixture(params=ENGINES)
def generator(request, generators):
    return generators[request.param]


def after(n_questions):
    """Say that nobody wants the text from a number of questions on; ``asked`` counts them."""

    def cancelled():
        cancelled.asked += 1
        return cancelled.asked > n_questions

    cancelled.asked = 0
    return cancelled


def test_what_is_wanted_is_what_nobody_asks_about(generator):
    expected = generator.generate(PROMPTS[0], max_new_tokens=12)
    found = generator.generate(PROMPTS[0], max_new_tokens=12, cancelled=lambda: False)
    assert (found.text, found.n_new_tokens) == (expected.text, expected.n_new_tokens)


@pytest.mark.parametrize("n_questions", [0, 1, 2, 3, 4, 6])
def test_it_ends_at_the_first_yes(generator, n_questions):
    expected = generator.generate(PROMPTS[0], max_new_tokens=8).text
    cancelled, written = after(n_questions), []
    with pytest.raises(GenerationCancelledError):
        generator.generate(PROMPTS[0], max_new_tokens=900, cancelled=cancelled, write=written.append)
    assert len(written) <= n_questions
    assert generator.generate(PROMPTS[0], max_new_tokens=8).text == expected  # nothing is locked, nothing left behind


@pytest.mark.parametrize("options", [{"stop": ["never"]}, {}], ids=["stops", "plain"])
def test_it_ends_while_tokens_come(generator, options):
    """Also where no text is handed on."""
    begin = time.monotonic()

    def cancelled():
        return bool(written)

    written = []
    with pytest.raises(GenerationCancelledError):
        generator.generate(PROMPTS[0], max_new_tokens=900, cancelled=cancelled, write=written.append, **options)
    assert sum(map(len, written)) < 200 and time.monotonic() - begin < 60


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_prefill_asks_at_every_step(generators, engine):
    generator = generators[engine]
    model, seen = generator.language_model.model, []
    layers = model.model.layers

    def n_hooks():
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    before = n_hooks()
    hooks = [layer.register_forward_hook(lambda *_, n=number: seen.append(n)) for number, layer in enumerate(layers)]
    try:
        with pytest.raises(GenerationCancelledError):
            generator.generate(PROMPTS[0], max_new_tokens=4, cancelled=lambda: bool(seen))
        assert seen == [0]
        seen.clear()
        cancelled = after(10**9)
        generator.generate(PROMPTS[0], max_new_tokens=4, cancelled=cancelled)
        assert cancelled.asked > 7 * len(layers)
    finally:
        for hook in hooks:
            hook.remove()
    assert n_hooks() == before


def test_llama_cpp_leaves_a_long_prompt(generators):
    """Its server is free for the next request soon, however much of the prompt is left."""
    generator = generators["llamacpp"]
    asked = threading.Event()
    with pytest.raises(GenerationCancelledError):
        generator.generate(
            "word " * 300, max_new_tokens=4, mode="dense", cancelled=lambda: asked.is_set() or asked.set()
        )
    assert generator.generate(PROMPTS[0], max_new_tokens=4).n_new_tokens == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "coreinfer-sim-watch"]
