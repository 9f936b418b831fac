"""Text in, text out: what a call returns, what it refuses, chat, streams, and what is routed by."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace

import pytest
import torch
from tiny_models import save_tiny_checkpoint, tiny_model
from transformers import DynamicCache

from coreinfer_sim.base.errors import GenerationError, PromptError
from coreinfer_sim.choosing.make import make_predictor
from coreinfer_sim.choosing.predictors import FixedPredictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.modules import installed
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.text import Generation
from coreinfer_sim.models.loading import LanguageModel, load_model
from coreinfer_sim.models.mlps import dense_bytes, find_mlps

PROMPT = "How do stars form?"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is bread?"},
    {"role": "assistant", "content": "Food."},
    {"role": "user", "content": "Why does it rise?"},
]


class NotingPredictor:
    """Keeps everything, and notes by which texts it was asked."""

    mode = "noting"
    needs_text = True
    alpha = None

    def __init__(self):
        self.prompts = []

    def select(self, prompts, statistics, n_rows):
        self.prompts.append(prompts)
        return [NeuronSelection(self.mode, cluster=3, similarity=0.123456, label="bread")] * n_rows


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def random_predictor(language_model):
    return make_predictor("random", language_model.layers, keep_ratio=0.5)


@pytest.fixture
def generator(language_model, random_predictor):
    return TextGenerator(language_model, predictor=random_predictor)


def with_tokenizer(language_model, **changed):
    tokenizer = copy.deepcopy(language_model.tokenizer)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return replace(language_model, tokenizer=tokenizer)


@torch.no_grad()
def by_hand(language_model, selection, ids, n_new):
    """Dense prefill, then one token after the other with the compact MLPs."""
    cache = DynamicCache(config=language_model.model.config)
    tokens = [language_model.model(ids, past_key_values=cache).logits[0, -1].argmax()]
    with installed(language_model.layers, selection):
        while len(tokens) < n_new:
            tokens.append(language_model.model(tokens[-1].view(1, 1), past_key_values=cache).logits[0, -1].argmax())
    return [int(token) for token in tokens]


def test_the_result(language_model, random_predictor, generator):
    tokenizer, layers = language_model.tokenizer, language_model.layers
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    result = generator.generate(PROMPT, max_new_tokens=12)
    (selection,) = random_predictor.select(None, None, 1)
    assert isinstance(result, Generation)
    assert result.prompt == PROMPT
    assert result.token_ids == by_hand(language_model, selection, ids, 12)
    assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True) != ""
    assert result.n_prompt_tokens == ids.shape[1] > 1
    assert result.selection is selection
    assert result.keep_ratio == 0.5
    assert result.dense_mlp_bytes_per_token == dense_bytes(layers) == 3 * 3 * 32 * 48 * 4
    assert result.mlp_bytes_per_token == result.dense_mlp_bytes_per_token // 2
    other = generator.engines[0].other_bytes()
    assert result.total_bytes_per_token == result.mlp_bytes_per_token + other > other
    assert (result.engine, result.not_first, result.n_new_tokens, result.ended) == ("lean", None, 12, False)
    assert result.tokens_per_second == pytest.approx(11 / result.decode_seconds)


def test_seconds_of_prefill_and_decode(language_model, generator, monkeypatch):
    """By a clock that ticks with every forward pass: the first token belongs to prefill, all others and the swap to decode."""
    ticks = []
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(ticks)))
    hook = language_model.model.register_forward_hook(lambda *_: ticks.append(1))
    try:
        for options in ({}, {"write": lambda piece: None}):
            result = generator.generate(PROMPT, max_new_tokens=8, **options)
            assert result.prefill_seconds == 1.0
            assert result.decode_seconds == 7.0 - result.prepare_seconds
            assert result.tokens_per_second == 7 / result.decode_seconds
    finally:
        hook.remove()


def test_sparse_text_is_not_dense_text(language_model, generator):
    dense = TextGenerator(language_model, predictor=make_predictor("dense", language_model.layers))
    texts = [each.generate(PROMPT, max_new_tokens=16) for each in (generator, dense)]
    assert texts[0].token_ids[0] == texts[1].token_ids[0]
    assert texts[0].token_ids != texts[1].token_ids
    assert texts[1].keep_ratio == 1.0
    assert texts[1].mlp_bytes_per_token == texts[1].dense_mlp_bytes_per_token
    encoded = language_model.tokenizer(PROMPT, return_tensors="pt")
    expected = language_model.model.generate(**encoded, max_new_tokens=16, do_sample=False)
    assert texts[1].token_ids == expected[0, encoded["input_ids"].shape[1] :].tolist()


def test_as_dict_is_json(language_model):
    result = TextGenerator(language_model, predictor=NotingPredictor()).generate(PROMPT, max_new_tokens=5)
    found = json.loads(json.dumps(result.as_dict()))
    assert found["prompt"] == PROMPT
    assert found["text"] == result.text
    assert (found["mode"], found["cluster"], found["label"], found["similarity"]) == ("noting", 3, "bread", 0.1235)
    assert (found["n_new_tokens"], found["n_prompt_tokens"]) == (5, result.n_prompt_tokens)
    assert found["keep_ratio"] == 1.0
    assert found["mlp_bytes_per_token"] == found["dense_mlp_bytes_per_token"] == result.mlp_bytes_per_token


def test_one_new_token_has_no_decode_speed(generator):
    result = generator.generate(PROMPT, max_new_tokens=1)
    assert len(result.token_ids) == 1
    assert result.tokens_per_second is None
    assert result.as_dict()["tokens_per_second"] is None


def test_one_new_token_in_stability_mode(language_model):
    stability = make_predictor("stability", language_model.layers, keep_ratio=0.5)
    result = TextGenerator(language_model, predictor=stability).generate(PROMPT, max_new_tokens=1)
    assert len(result.token_ids) == 1
    assert result.selection.mode == "stability"


def test_stability_mode(language_model):
    generator = TextGenerator(
        language_model, predictor=make_predictor("stability", language_model.layers, keep_ratio=0.5)
    )
    results = [generator.generate(prompt, max_new_tokens=6) for prompt in (PROMPT, "Bread rises because of yeast.")]
    assert [result.keep_ratio for result in results] == [0.5, 0.5]
    kept = [result.selection.ids[0].tolist() for result in results]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", [], [{"role": "user", "content": " "}]])
def test_an_empty_prompt_is_refused(generator, prompt):
    with pytest.raises(PromptError, match="the prompt is empty"):
        generator.generate(prompt)


def test_messages_without_a_user_are_refused(generator):
    with pytest.raises(PromptError, match="the conversation has no message of the user, expected one"):
        generator.generate([{"role": "system", "content": "Be brief."}])


def test_a_prompt_that_does_not_fit_is_refused(tmp_path):
    language_model = load_model(save_tiny_checkpoint(tmp_path / "short", max_position_embeddings=40))
    generator = TextGenerator(language_model, predictor=make_predictor("dense", language_model.layers))
    n_prompt = len(language_model.tokenizer(PROMPT)["input_ids"])
    room = 40 - n_prompt
    assert len(generator.generate(PROMPT, max_new_tokens=room).token_ids) == room
    with pytest.raises(PromptError) as refusal:
        generator.generate(PROMPT, max_new_tokens=room + 1)
    assert isinstance(refusal.value, GenerationError)
    for number in (f"{n_prompt} tokens", f"{room + 1} new ones", "context is 40", f"at most {room}."):
        assert number in str(refusal.value)
    with pytest.raises(PromptError, match=r"context is 40, into which the answer has to fit too; shorten"):
        generator.generate(" ".join([PROMPT] * 20), max_new_tokens=1)


def test_a_model_without_a_context_length_takes_any_prompt(language_model):
    model = tiny_model("bloom")
    model.resize_token_embeddings(len(language_model.tokenizer))
    unlimited = LanguageModel(model, language_model.tokenizer, "tiny-bloom", find_mlps(model))
    assert unlimited.context_length is None
    assert language_model.context_length == 1024
    generator = TextGenerator(unlimited, predictor=make_predictor("random", unlimited.layers, keep_ratio=0.5))
    assert len(generator.generate(PROMPT, max_new_tokens=3).token_ids) == 3


def test_chat_uses_the_template(language_model, generator, random_predictor):
    (selection,) = random_predictor.select(None, None, 1)
    tokenizer = language_model.tokenizer
    for prompt, options, text in [
        (PROMPT, {"chat": True}, f"<|user|>{PROMPT}\n<|assistant|>"),
        (
            MESSAGES,
            {},
            "<|system|>Be brief.\n<|user|>What is bread?\n<|assistant|>Food.\n<|user|>Why does it rise?\n<|assistant|>",
        ),
    ]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        result = generator.generate(prompt, max_new_tokens=6, **options)
        assert result.n_prompt_tokens == ids.shape[1]
        assert result.token_ids == by_hand(language_model, selection, ids, 6)
    plain = generator.generate(PROMPT, max_new_tokens=6)
    assert plain.n_prompt_tokens < generator.generate(PROMPT, chat=True, max_new_tokens=6).n_prompt_tokens


@pytest.mark.parametrize(("prompt", "options"), [(PROMPT, {"chat": True}), (MESSAGES, {})], ids=["text", "messages"])
def test_chat_without_a_template_is_refused(language_model, random_predictor, prompt, options):
    bare = with_tokenizer(language_model, chat_template=None)
    with pytest.raises(PromptError, match="has no chat template; give the prompt as plain text") as refusal:
        TextGenerator(bare, predictor=random_predictor).generate(prompt, **options)
    assert language_model.name in str(refusal.value)
    assert TextGenerator(bare, predictor=random_predictor).generate(PROMPT, max_new_tokens=2).n_prompt_tokens > 0


@pytest.mark.parametrize(
    ("prompt", "options", "routed"),
    [
        (PROMPT, {}, PROMPT),
        (PROMPT, {"chat": True}, PROMPT),
        (MESSAGES, {}, "Why does it rise?"),
        (MESSAGES[:3], {}, "What is bread?"),
        (MESSAGES[:2], {"chat": True}, "What is bread?"),
    ],
    ids=["text", "chat", "messages", "ends-with-assistant", "messages-chat"],
)
def test_routing_looks_at_the_last_user_message(language_model, prompt, options, routed):
    predictor = NotingPredictor()
    result = TextGenerator(language_model, predictor=predictor).generate(prompt, max_new_tokens=2, **options)
    assert predictor.prompts == [[routed]]
    assert result.prompt == routed


@pytest.mark.parametrize("seed", range(4))
def test_what_is_streamed_is_the_text(language_model, generator, seed):
    pieces = []
    torch.manual_seed(seed)
    result = generator.generate(PROMPT, max_new_tokens=60, write=pieces.append, temperature=0.7)
    assert "".join(pieces) == result.text
    assert len(pieces) > 1
    assert all(pieces)
    torch.manual_seed(seed)
    silent = generator.generate(PROMPT, max_new_tokens=60, temperature=0.7)
    assert silent.token_ids == result.token_ids


def test_pieces_come_while_tokens_are_generated(generator):
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generator.generate(PROMPT, max_new_tokens=60, write=write)
    assert len(pieces) == 2
    assert "".join(pieces) != generator.generate(PROMPT, max_new_tokens=60).text


def test_beams_are_written_at_the_end(generator):
    pieces = []
    result = generator.generate(PROMPT, max_new_tokens=8, num_beams=3, write=pieces.append)
    assert pieces == [result.text]
    assert len(result.token_ids) == 8
    assert result.decode_seconds > 0 < result.prefill_seconds  # they do not stream, but decode begins all the same


def test_generation_stops_at_the_end_token(language_model, generator, monkeypatch):
    free = generator.generate(PROMPT, max_new_tokens=10)
    end = free.token_ids[4]
    monkeypatch.setattr(language_model.model.generation_config, "eos_token_id", end)
    result = generator.generate(PROMPT, max_new_tokens=10)
    assert result.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert result.ended and not free.ended
    assert generator.generate(PROMPT, max_new_tokens=10, ignore_eos=True).token_ids == free.token_ids


def test_a_checkpoint_that_asks_for_beams(tmp_path):
    language_model = load_model(save_tiny_checkpoint(tmp_path / "beams"))
    language_model.model.generation_config.num_beams = 2
    pieces = []
    generator = TextGenerator(language_model, predictor=make_predictor("dense", language_model.layers))
    assert generator.generate(PROMPT, max_new_tokens=4, write=pieces.append).text == "".join(pieces)


def test_the_end_token_is_no_text(language_model, generator, monkeypatch):
    tokenizer, pieces = language_model.tokenizer, []
    monkeypatch.setattr(language_model.model.generation_config, "forced_eos_token_id", tokenizer.eos_token_id)
    result = generator.generate(PROMPT, max_new_tokens=6, write=pieces.append)
    assert result.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token in tokenizer.decode(result.token_ids)
    assert result.text == "".join(pieces) == tokenizer.decode(result.token_ids[:-1])


@pytest.mark.parametrize("options", [{}, {"write": lambda _piece: None}], ids=["silent", "streamed"])
def test_the_text_ends_before_its_first_stop(language_model, generator, options):
    free = generator.generate(PROMPT, max_new_tokens=30, **options)
    stop = free.text[len(free.text) // 2 :][:3]
    result = generator.generate(PROMPT, max_new_tokens=30, stop=("no such text", stop), **options)
    assert result.ended and result.text == free.text[: free.text.find(stop)]
    assert len(result.token_ids) < 30
    assert language_model.tokenizer.decode(result.token_ids).startswith(result.text + stop)


def test_a_special_token_may_be_a_stop(language_model, generator):
    """It is no text, but clients name the ends of turns so."""
    tokenizer, free = language_model.tokenizer, generator.generate(PROMPT, max_new_tokens=12)
    special = tokenizer.decode(free.token_ids[4])
    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": [special]})
    assert marked.convert_tokens_to_ids(special) == free.token_ids[4]
    found = TextGenerator(replace(language_model, tokenizer=marked), predictor=generator.sparse_model().predictor)
    result = found.generate(PROMPT, max_new_tokens=12, stop=special)
    assert result.ended and result.n_new_tokens == 1 + free.token_ids.index(free.token_ids[4])
    assert special not in result.text


def test_beams_end_before_a_stop(generator):
    free = generator.generate(PROMPT, max_new_tokens=30, num_beams=2)
    letters = sorted(set(free.text))
    result = generator.generate(PROMPT, max_new_tokens=30, num_beams=2, stop=letters)
    assert result.ended and len(result.token_ids) < 30 and not set(letters).intersection(result.text)


@pytest.mark.parametrize("n_stops", [1, 5, 300])
def test_a_stop_at_the_limit_is_an_end(generator, n_stops):
    free = generator.generate(PROMPT, max_new_tokens=12)
    stops = [f"never {number}" for number in range(n_stops - 1)] + [free.text[-1]]
    result = generator.generate(PROMPT, max_new_tokens=12, stop=stops)
    assert result.ended and result.text == free.text[: free.text.find(free.text[-1])]
    assert not generator.generate(PROMPT, max_new_tokens=12, stop=["never"]).ended


def test_a_selection_by_hand(language_model):
    """Whatever made the selection, the costs are its own."""
    selection = NeuronSelection("mine", {1: torch.arange(12)})
    result = TextGenerator(language_model, predictor=FixedPredictor(selection)).generate(PROMPT, max_new_tokens=4)
    per_layer = 3 * 32 * 48 * 4
    assert result.mlp_bytes_per_token == 2 * per_layer + per_layer // 4
    assert result.keep_ratio == pytest.approx((48 + 12 + 48) / 144)
    assert result.as_dict()["mode"] == "mine"
