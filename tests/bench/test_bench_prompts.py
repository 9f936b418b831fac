"""Prompts have the requested length."""

from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer

from coreinfer_sim.base.errors import PromptError
from coreinfer_sim.bench.programs import Subject
from coreinfer_sim.bench.prompts import cut_prompts, make_prompts
from coreinfer_sim.bench.shapes import byte_tokenizer, parse_shape


def test_prompts_have_the_length_that_was_asked_for():
    for tokenizer in (tiny_tokenizer(), byte_tokenizer()):
        for text in (None, "One line.\n\nAnd another, which is longer."):
            prompts = cut_prompts(tokenizer, text, 50, 3)
            assert [len(tokenizer(prompt.text)["input_ids"]) for prompt in prompts] == [50, 50, 50]
            assert prompts[0].ids != prompts[1].ids
    drawn = make_prompts(Subject(None, parse_shape("smollm2-135m")), None, 33, 4, 2, seed=1)
    assert [len(prompt.ids) for prompt in drawn] == [33, 33] and drawn[0] != drawn[1]
    with pytest.raises(PromptError, match="is empty"):
        cut_prompts(tiny_tokenizer(), " \n ", 4, 1)
