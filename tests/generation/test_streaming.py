"""Tokens become text at once, whatever the text is; the pieces join to the whole, and end before the first stop."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from coreinfer_sim.base.errors import GenerationCancelledError
from coreinfer_sim.generation.streaming import Detokenizer, TextOutput

TEXTS = {
    "words": "Stars form when clouds of gas collapse.",
    "dna": "ACGTTGCAACGT" * 4,
    "chinese": "恒星是如何形成的？气体云在自身重力下坍缩。",
    "thai": "ดาวฤกษ์เกิดขึ้นได้อย่างไร",
    "emoji": "👩‍🚀🌟🇫🇷e\u0301",
    "base64": "aGVsbG8gd29ybGQ/IT09Cg==" * 3,
    "code": "def f(x):\n    if x:\n        return [x]\n\n\n    return None\n",
    "spaces": "  two  spaces \t and a tab ",
}


def sentencepiece_tokenizer():
    """Pieces with a mark for spaces, bytes for all else, and a first space that decoding drops."""
    pieces = ["<unk>", "<s>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz▁▁"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "▁a", "▁st", "▁▁"]))}
    merges = [("s", "t"), ("▁", "st"), ("▁", "a"), ("▁", "▁")]
    vocabulary.setdefault("st", len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {"bytes": tiny_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEXTS)
def test_every_text_streams_token_by_token(kind, name):
    tokenizer, text = TOKENIZERS[kind], TEXTS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    shown = ""
    for number, piece in enumerate(pieces[:-1], 1):
        shown += piece
        whole = tokenizer.decode(ids[:number], clean_up_tokenization_spaces=False)
        assert "\ufffd" not in shown and (shown == whole or "\ufffd" in whole)  # only half a character waits


@given(st.sampled_from(list(TOKENIZERS)), st.text(max_size=40))
def test_pieces_join_to_the_whole(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(st.lists(st.integers(4, 399), max_size=60))
def test_pieces_of_broken_characters_join_to_the_whole(ids):
    """As random weights write them."""
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_what_never_becomes_a_character_is_not_held_for_long():
    tokenizer = TOKENIZERS["bytes"]
    (broken,) = [token for token in range(4, 260) if tokenizer.convert_ids_to_tokens(token) == "Ģ"]  # a middle byte
    detokenizer, shown = Detokenizer(tokenizer), ""
    for number in range(1, 41):
        shown += detokenizer.add(broken)
        assert number - len(shown) <= 8


def test_end_tokens_and_special_ones_are_no_text():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, ends=[ids[-1]])
    assert "".join(detokenizer.add(token) for token in [ids[0], tokenizer.eos_token_id, ids[-1]]) == "a"


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
@example(["bc", "a"], ["c", "bca"])
def test_text_is_cut_before_the_first_stop(pieces, stops):
    """The text ends with the piece that completes a stop, so that what would complete another one is never written."""
    written = []
    output = TextOutput(stops, written.append)
    for piece in pieces:
        output.add(piece)
    texts = ["".join(pieces[:n]) for n in range(len(pieces) + 1)]
    whole = next((text for text in texts if any(stop in text for stop in stops)), texts[-1])
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert output.end() == "".join(written) == whole[: min(places, default=len(whole))]
    assert output.stopped == bool(places) and all(written)


def test_only_what_may_become_a_stop_is_held_back():
    written = []
    output = TextOutput(["END", "\n\nUser:"], written.append)
    for piece in ("a", "b E", "N", "x", "\n", "\ny"):
        output.add(piece)
    assert written == ["a", "b ", "ENx", "\n\ny"]


def test_a_text_that_nobody_wants_is_broken_off():
    output = TextOutput(cancelled=lambda: True)
    with pytest.raises(GenerationCancelledError):
        output.check()
    TextOutput().check()
