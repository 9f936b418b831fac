"""A prompt that begins as an earlier text did is read from there on, and its text is what it would have been anyway."""

from __future__ import annotations

import pytest
import torch
from calls import CallAt, by_hand, generate, random_predictor, selection, token_ids
from lean_types import TYPES, WINDOW, model_named
from tiny_models import tiny_model

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import GenerationCancelledError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.lean.engine import LeanEngine
from coreinfer_sim.generation.prefix_cache import PrefixCache
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.models.mlps import find_mlps

ROOM = 1 << 20
N_PROMPT, N_NEXT, N_NEW = 20, 5, 7
GROWING = ["llama-dynamic", "phi3-longrope"]
WINDOWED = [
    *(
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "vaultgemma",
        "ministral",
        "cwm",
        "exaone4",
        "phi3",
        "olmo3",
    ),
    *("cohere2", "starcoder2"),
]


def dense(model):
    return make_predictor("dense", find_mlps(model))


def talk(model, predictor, prefixes, n_turns=3, n_prompt=N_PROMPT, **options):
    """Return the text of a conversation, each of whose prompts repeats all before it, and what each turn took from the cache."""
    sparse = SparseModel(model, predictor, prefixes=prefixes, **options)
    text, known = token_ids(1, n_prompt), []
    for turn in range(n_turns):
        if turn:
            text = torch.cat([text, token_ids(1, N_NEXT, seed=turn)], 1)
        text = sparse.generate(text, max_new_tokens=N_NEW, do_sample=False)
        known.append(sparse.latest.n_known)
    return text, known


def check(model, predictor, known, prefixes=None, **options):
    prefixes = prefixes or PrefixCache(ROOM)
    found = talk(model, predictor, prefixes, **options)
    expected = talk(model, predictor, None, **options)
    assert torch.equal(found[0], expected[0])
    assert found[1] == known and expected[1] == [0] * len(known)


def ends(first=N_PROMPT, left_out=0):
    """What each turn finds of the one before: its text, but for the last tokens."""
    return [0, *(first + N_NEW - left_out + turn * (N_NEXT + N_NEW) for turn in range(2))]


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_a_dense_answer_is_not_read_again(engine):
    """But for its last token, which was never read."""
    model = tiny_model("llama")
    check(model, dense(model), ends(left_out=1), engine=engine)


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_a_sparse_answer_is_read_once_more(engine):
    model = tiny_model("llama")
    check(model, random_predictor(model), ends(left_out=N_NEW), engine=engine)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in GROWING])
def test_every_type_of_the_lean_engine(name):
    """Caches whose windows have let go of positions cannot be cut, and are not kept."""
    model = model_named(name)
    check(model, dense(model), [0, 0, 0] if name in WINDOWED else ends(left_out=1), engine="lean")


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_windows_that_see_everything_so_far(engine):
    model, n_prompt = model_named("mistral"), WINDOW - 2
    check(model, random_predictor(model), [0, 0], engine=engine, n_turns=2)
    cache = PrefixCache(ROOM)
    sparse = SparseModel(model, random_predictor(model), engine=engine, prefixes=cache)
    text, longer = token_ids(1, n_prompt), token_ids(1, 4, seed=1)
    sparse.generate(text, max_new_tokens=1)
    found = generate(sparse, torch.cat([text, longer], 1))
    assert sparse.latest.n_known == n_prompt
    assert torch.equal(found.sequences, by_hand(model, selection(model), torch.cat([text, longer], 1))[0])


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_keys_that_depend_on_the_length_are_not_kept(name, engine):
    model = model_named(name)
    check(model, dense(model), [0, 0, 0], engine=engine)


@pytest.mark.parametrize("key", ["bloom", "falcon", "gpt2", "opt", "phi2"])
def test_other_families_in_transformers(models, key):
    model = models[key]
    check(model, dense(model), ends(left_out=1), engine="transformers")


def test_weights_that_prefill_does_not_read():
    model = tiny_model("llama")
    check(model, dense(model), ends(left_out=N_NEW), engine="lean", weights="int8")


def test_tokens_that_choose():
    model = tiny_model("llama")
    engine = LeanEngine(model, find_mlps(model), DecodeConfig())
    engine.calibrate(lambda: [token_ids(1, 100, seed=50 + n)[0] for n in range(6)])
    chosen = FixedPredictor(NeuronSelection("all", read_ratio=0.4))
    check(model, chosen, ends(left_out=N_NEW), engines=[engine])


@pytest.mark.parametrize("engine", ["lean", "transformers"])
def test_sparse_prefill_goes_on_from_the_same_neurons_alone(engine):
    model, prefixes = tiny_model("llama"), PrefixCache(ROOM)
    one, other = (FixedPredictor(selection(model, seed=seed)) for seed in (1, 2))
    options = {"engine": engine, "prefill": "sparse"}
    check(model, one, ends(left_out=1), prefixes, **options)
    check(model, other, ends(left_out=1), prefixes, **options)
    check(model, dense(model), ends(left_out=1), prefixes, engine=engine)


def test_modes_that_read_the_prompt_see_all_of_it():
    """What they have read serves the others."""
    model, prefixes = tiny_model("llama"), PrefixCache(ROOM)
    check(model, make_predictor("stability", find_mlps(model), keep_ratio=0.5), [0, 0, 0], prefixes)
    check(model, dense(model), [N_PROMPT - 1], prefixes, n_turns=1)


def test_the_same_prompt_again_reads_its_last_token():
    model = tiny_model("llama")
    sparse = SparseModel(model, random_predictor(model), prefixes=PrefixCache(ROOM))
    ids = token_ids(1, N_PROMPT)
    texts = [sparse.generate(ids, max_new_tokens=N_NEW, do_sample=False) for _ in range(2)]
    assert torch.equal(*texts) and sparse.latest.n_known == N_PROMPT - 1


def test_chance_draws_the_same_tokens():
    model = tiny_model("llama")
    sparse, texts = SparseModel(model, random_predictor(model), prefixes=PrefixCache(ROOM)), []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(sparse.generate(token_ids(1, N_PROMPT), max_new_tokens=20, do_sample=True))
    assert torch.equal(*texts)


def test_a_long_prompt_goes_on_in_passes(monkeypatch):
    monkeypatch.setattr("coreinfer_sim.engines.lean.engine.PASS_TOKENS", 8)
    model = tiny_model("llama")
    check(model, random_predictor(model), ends(50, left_out=N_NEW), n_prompt=50)


def test_batches_and_beams_are_read_as_a_whole():
    model, prefixes = tiny_model("llama"), PrefixCache(ROOM)
    sparse = SparseModel(model, random_predictor(model), prefixes=prefixes)
    sparse.generate(token_ids(2, N_PROMPT), max_new_tokens=2)
    sparse.generate(token_ids(1, N_PROMPT), max_new_tokens=2, num_beams=2)
    assert prefixes.n_bytes == 0


def test_the_compiled_engine_brings_its_own_cache():
    model, prefixes = tiny_model("llama"), PrefixCache(ROOM)
    sparse = SparseModel(model, dense(model), engine="compiled", prefixes=prefixes)
    sparse.generate(token_ids(1, N_PROMPT), max_new_tokens=1)
    assert prefixes.n_bytes == 0


def test_a_text_that_is_broken_off_leaves_what_was_read():
    model = tiny_model("llama")
    sparse, ids = SparseModel(model, random_predictor(model), prefixes=PrefixCache(ROOM)), token_ids(1, N_PROMPT)

    def leave():
        raise GenerationCancelledError("left")

    with pytest.raises(GenerationCancelledError):
        sparse.generate(ids, max_new_tokens=N_NEW, stopping_criteria=[CallAt(N_PROMPT + 2, leave)])
    longer = torch.cat([ids, token_ids(1, N_NEXT, seed=1)], 1)
    found = sparse.generate(longer, max_new_tokens=N_NEW, do_sample=False)
    assert sparse.latest.n_known == N_PROMPT
    plain = SparseModel(model, random_predictor(model)).generate(longer, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(found, plain)


def test_a_pass_that_is_broken_off_leaves_what_all_layers_have_read(monkeypatch):
    monkeypatch.setattr("coreinfer_sim.engines.lean.engine.PASS_TOKENS", 8)
    model = tiny_model("llama")
    sparse, ids, passes = SparseModel(model, random_predictor(model), prefixes=PrefixCache(ROOM)), token_ids(1, 24), []

    def leave(*_):
        passes.append(1)
        if len(passes) == 3:
            raise GenerationCancelledError("left")

    hook = model.model.layers[1].register_forward_pre_hook(leave)
    with pytest.raises(GenerationCancelledError):
        sparse.generate(ids, max_new_tokens=N_NEW)
    hook.remove()
    found = sparse.generate(ids, max_new_tokens=N_NEW, do_sample=False)
    assert sparse.latest.n_known == 16
    plain = SparseModel(model, random_predictor(model)).generate(ids, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(found, plain)


# --- what is kept -----------------------------------------------------------------------------------------------------


def read(model, prefixes, *texts):
    """Read texts; return how many tokens of each were known."""
    sparse, known = SparseModel(model, random_predictor(model), prefixes=prefixes), []
    for text in texts:
        sparse.generate(text, max_new_tokens=1)
        known.append(sparse.latest.n_known)
    return known


def position_bytes(model):
    config = model.config
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_memory_is_bounded_and_the_text_used_longest_ago_goes():
    model, texts = tiny_model("llama"), [token_ids(1, 10, seed=seed) for seed in range(3)]
    prefixes = PrefixCache(25 * position_bytes(model))
    assert read(model, prefixes, texts[0], texts[1]) == [0, 0]
    assert prefixes.n_bytes == 20 * position_bytes(model)
    assert read(model, prefixes, texts[0], texts[2], texts[0], texts[1]) == [9, 0, 9, 0]
    assert prefixes.n_bytes <= prefixes.limit


def test_a_text_that_goes_on_takes_the_place_of_its_beginning():
    model, prefixes, text = tiny_model("llama"), PrefixCache(ROOM), token_ids(1, 30)
    assert read(model, prefixes, text[:, :10], text, text[:, :20]) == [0, 10, 19]
    assert prefixes.n_bytes == 30 * position_bytes(model)


def test_two_texts_with_one_beginning():
    model, prefixes, one, two = tiny_model("llama"), PrefixCache(ROOM), token_ids(1, 30), token_ids(1, 30, seed=1)
    two[:, :12] = one[:, :12]
    assert read(model, prefixes, one, two, one, two) == [0, 12, 29, 29]


def test_of_a_text_that_is_too_long_the_beginning_is_kept():
    model = tiny_model("llama")
    prefixes = PrefixCache(8 * position_bytes(model) + 1)
    assert read(model, prefixes, token_ids(1, 30), token_ids(1, 30)) == [0, 8]


def test_nothing_is_kept_where_there_is_no_room():
    model = tiny_model("llama")
    for prefixes in (PrefixCache(0), PrefixCache(position_bytes(model) - 1)):
        assert read(model, prefixes, token_ids(1, 30), token_ids(1, 30)) == [0, 0]
        assert prefixes.n_bytes == 0


def test_all_can_be_let_go():
    model, prefixes = tiny_model("llama"), PrefixCache(ROOM)
    read(model, prefixes, token_ids(1, 30))
    prefixes.clear()
    assert prefixes.n_bytes == 0 and read(model, prefixes, token_ids(1, 30)) == [0]
