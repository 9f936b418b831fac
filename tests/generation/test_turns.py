"""Threads that generate at the same time share decode steps, and each gets the text that it would have got alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_index import PROMPTS, WIDE_RATIO

from coreinfer_sim.base.errors import GenerationCancelledError, GenerationError
from coreinfer_sim.generation.opening import load
from coreinfer_sim.generation.turns import Turns
from coreinfer_sim.models.loading import load_model

ASKED = [
    (PROMPTS[0], {"max_new_tokens": 40}),
    (PROMPTS[1], {"max_new_tokens": 25, "mode": "dense"}),
    (PROMPTS[2] * 5, {"max_new_tokens": 40}),
    (PROMPTS[0], {"max_new_tokens": 30, "mode": "stability"}),
    (PROMPTS[1], {"max_new_tokens": 30, "temperature": 1.0, "seed": 3}),
    (PROMPTS[2], {"max_new_tokens": 30, "temperature": 0.8, "top_p": 0.9, "seed": 4}),
    (PROMPTS[0], {"max_new_tokens": 20, "num_beams": 3}),
    (PROMPTS[1], {"max_new_tokens": 40, "repetition_penalty": 1.3}),
]
"""Of unlike lengths, neurons, and ways of choosing tokens."""


def opened(model, index, **options):
    return load(index, model, **{"keep_ratio": WIDE_RATIO, "fallback": "none", "prefix_bytes": 0, **options})


@pytest.fixture(scope="module")
def language_model(wide_checkpoint):
    return load_model(wide_checkpoint, "float32")


def noted(generator):
    """Note how many calls share each step of a generator's engine."""
    engine, sizes = generator.engines[0], []
    steps = engine.steps
    engine.steps = lambda each: sizes.append(len(each)) or steps(each)
    return sizes


def together(generator, asked):
    """Generate in as many threads as there are prompts, which begin at the same time."""
    barrier = threading.Barrier(len(asked))

    def ask(each):
        barrier.wait()
        return generator.generate(each[0], **each[1])

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, asked))


SETTINGS = [{}, {"weights": "int8"}, {"read_ratio": 0.4, "mode": "all", "keep_ratio": None}, {"prefix_bytes": 1 << 20}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings) or "plain")
def test_texts_are_those_of_calls_alone(language_model, wide_index, settings):
    generator = opened(language_model, wide_index, **settings)
    assert generator.takes_turns
    alone = [generator.generate(prompt, **options) for prompt, options in ASKED]
    sizes = noted(generator)
    for _ in range(2):
        found = together(generator, ASKED)
        assert [run.token_ids for run in found] == [run.token_ids for run in alone]
        assert [run.text for run in found] == [run.text for run in alone]
    assert max(sizes) > 2
    for one, other in zip(found, alone, strict=True):
        assert (one.selection.mode, one.engine, one.n_prompt_tokens) == (
            other.selection.mode,
            other.engine,
            other.n_prompt_tokens,
        )
        assert one.read_ratio == pytest.approx(other.read_ratio, rel=0.2)  # of rows that read alike, their mean


def test_bytes_of_a_call_are_those_of_its_own_neurons(language_model, wide_index):
    generator = opened(language_model, wide_index)
    asked = [(prompt, {"max_new_tokens": 30, "mode": mode}) for mode in ("similarity", "dense") for prompt in PROMPTS]
    alone = [generator.generate(prompt, **options) for prompt, options in asked]
    for run, expected in zip(together(generator, asked), alone, strict=True):
        assert run.mlp_bytes_per_token == expected.mlp_bytes_per_token
        assert run.total_bytes_per_token == expected.total_bytes_per_token


def test_an_engine_that_does_not_share_serves_one_after_the_other(language_model, wide_index):
    for settings in ({"engine": "transformers"}, {"prefill": "sparse"}):
        generator = opened(language_model, wide_index, **settings)
        assert not generator.takes_turns
        asked = [(prompt, {"max_new_tokens": 10}) for prompt in PROMPTS]
        alone = [generator.generate(prompt, **options).token_ids for prompt, options in asked]
        assert [run.token_ids for run in together(generator, asked)] == alone


def test_who_leaves_or_fails_disturbs_nobody(language_model, wide_index):
    generator = opened(language_model, wide_index)
    expected = generator.generate(PROMPTS[0], max_new_tokens=60).text
    written = []

    def fail(piece):
        written.append(piece)
        if len(written) == 5:
            raise ZeroDivisionError

    def leaves(n_questions):
        asked = iter(range(n_questions))
        return lambda: next(asked, None) is None

    def outcome(options):
        try:
            return generator.generate(PROMPTS[0], max_new_tokens=60, **options).text
        except Exception as error:
            return type(error)

    given = [{}, {"write": fail}, {}, *({"cancelled": leaves(n)} for n in (2, 6, 60))]
    with ThreadPoolExecutor(len(given)) as pool:
        found = list(pool.map(outcome, given))
    assert found == [expected, ZeroDivisionError, expected, *[GenerationCancelledError] * 3]
    assert generator.generate(PROMPTS[0], max_new_tokens=60).text == expected
    assert "forward" not in vars(language_model.model) and not vars(language_model.model).get("passes")


def test_a_call_that_nobody_wants_while_it_waits(language_model, wide_index):
    generator = opened(language_model, wide_index, engine="transformers")
    began, left = threading.Event(), threading.Event()

    def hold(_piece):
        began.set()
        left.wait(20)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generator.generate, PROMPTS[0], max_new_tokens=2, write=hold)
        assert began.wait(20)
        with pytest.raises(GenerationCancelledError):
            begin = time.monotonic()
            generator.generate(PROMPTS[1], max_new_tokens=2, cancelled=lambda: time.monotonic() > begin + 0.2)
        with pytest.raises(GenerationError, match="generating already"):
            generator.sparse_model().generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)
        left.set()
        assert running.result().n_new_tokens == 2


class Fake:
    """An engine whose steps fail on request."""

    def __init__(self):
        self.fails, self.sizes = False, []

    def steps(self, each):
        self.sizes.append(len(each))
        time.sleep(0.0005)  # so that other threads come to run
        if self.fails:
            raise ZeroDivisionError
        return [one * 2 for one in each]


def test_a_step_that_fails_fails_for_all_who_share_it():
    turns, engine = Turns(), Fake()
    engine.fails = True

    def call(number):
        with turns.call():
            return turns.step(engine, number)

    with ThreadPoolExecutor(4) as pool:
        assert all(isinstance(each.exception(), ZeroDivisionError) for each in [pool.submit(call, n) for n in range(4)])
    engine.fails = False
    assert call(3) == 6


def test_one_call_has_the_model_at_a_time_and_each_gets_its_own_step():
    turns, engine, inside = Turns(), Fake(), []

    def call(number):
        found = []
        with turns.call():
            for step in range(50):
                inside.append(number)
                assert len(inside) == 1
                inside.pop()
                found.append(turns.step(engine, 100 * number + step))
        return found

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(1, 17)))
    assert found == [[2 * (100 * number + step) for step in range(50)] for number in range(1, 17)]
    assert max(engine.sizes) > 4


def test_those_who_decode_are_not_held_up_by_those_who_come():
    """Between two calls that come in, all others get a step."""
    turns, engine, log = Turns(), Fake(), []

    def call(n_steps):
        with turns.call():
            log.append("comes")
            for _ in range(n_steps):
                turns.step(engine, 1)
                log.append("step")

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(call, 400)
        while not log:
            time.sleep(0.001)
        for each in [pool.submit(call, 1) for _ in range(8)]:
            each.result()
        first.result()
    places = [place for place, what in enumerate(log) if what == "comes"]
    assert all("step" in log[one:other] for one, other in zip(places, places[1:], strict=False))


def test_what_is_read_ahead_is_what_the_next_turn_would_read(language_model, wide_index):
    generator = opened(language_model, wide_index, prefix_bytes=1 << 20)
    turns = [generator.generate(PROMPTS[0], max_new_tokens=20)]
    generator.read_ahead(lambda: False)
    turns.append(generator.generate(PROMPTS[0] + turns[0].text + PROMPTS[1], max_new_tokens=20))
    assert turns[1].n_cached_tokens > turns[0].n_prompt_tokens + 3  # the answer's bytes become other tokens
    generator.read_ahead(lambda: True)  # nobody has time
    turns.append(generator.generate(turns[1].prompt + turns[1].text + PROMPTS[2], max_new_tokens=20))
    assert turns[2].n_cached_tokens <= turns[1].n_prompt_tokens
    anew = opened(language_model, wide_index)
    assert [anew.generate(run.prompt, max_new_tokens=20).token_ids for run in turns] == [run.token_ids for run in turns]


def test_a_call_goes_before_what_is_read_ahead(language_model, wide_index):
    """Whoever reads ahead lets go as soon as a call waits, and keeps what it has read."""
    generator = opened(language_model, wide_index, prefix_bytes=1 << 20)
    run, began, others = generator.generate(PROMPTS[0], max_new_tokens=20), threading.Event(), []

    def wait(*_):
        began.set()
        while not others:
            time.sleep(0.001)
        time.sleep(0.1)  # it waits by now

    hook = language_model.model.model.layers[0].register_forward_pre_hook(wait)
    reading = threading.Thread(target=generator.read_ahead, args=(lambda: False,))
    reading.start()
    assert began.wait(20)
    hook.remove()
    others.append(True)
    again = generator.generate(PROMPTS[0], max_new_tokens=20)
    reading.join()
    assert again.token_ids == run.token_ids and again.n_cached_tokens == run.n_prompt_tokens - 1


def test_nothing_is_read_ahead_where_nothing_is_left(language_model, wide_index):
    generator = opened(language_model, wide_index, prefix_bytes=1 << 20)
    generator.read_ahead(lambda: False)  # nothing was said yet
    for mode in ("dense", "stability"):
        generator.generate(PROMPTS[0], max_new_tokens=20, mode=mode)
        n_bytes = generator.prefixes.n_bytes
        generator.read_ahead(lambda: False)
        assert generator.prefixes.n_bytes == n_bytes
