"""Prompts of one length, the same tokens for every program."""

from __future__ import annotations

import random
from typing import Any

from transformers import AutoConfig

from coreinfer_sim.base.errors import ContextLengthError, ModelError, PromptError
from coreinfer_sim.base.hub import NO_CODE
from coreinfer_sim.bench.programs import Prompt, Subject
from coreinfer_sim.bench.shapes import byte_tokenizer
from coreinfer_sim.models.loading import load_tokenizer

TEXT = (
    "Stars form when a cold cloud of gas and dust collapses under its own weight, heats up and begins to fuse hydrogen.",
    "Bread rises because yeast eats the sugar in the dough and gives off carbon dioxide, which the gluten holds back.",
    "A judge reads the contract as a whole and asks what two reasonable people would have meant by each of its clauses.",
    "The heart pumps blood through arteries that branch again and again until single cells pass in file.",
    "A function that calls itself needs a case in which it does not, or the stack of unfinished calls grows until it breaks.",
    "Interest rates rise when the central bank wants fewer loans to be taken up, so that prices climb more slowly.",
    "The defender steps up at the moment of the pass, and the forward behind her is left standing offside.",
    "In the spring of that year the fleet sailed north, met the storms of the channel and lost a third of its ships.",
    "A syncopated rhythm puts its weight where the ear does not expect it, between the beats or on the weak ones.",
    "Irises that have grown too dense are lifted after they flower, cut into pieces with one fan each and set anew.",
    "Water boils at a lower temperature on a mountain, for the air above it presses less on its surface.",
    "The translator looks for a word that carries the same weight, and often finds that no single one does.",
)
"""What prompts are cut from unless a text is given; each line begins another topic."""


def make_prompts(
    subject: Subject, text: str | None, n_tokens: int, n_new: int, n_prompts: int, seed: int
) -> list[Prompt]:
    """Return prompts of ``n_tokens`` tokens: random ones for a shape, else cut from ``text``.

    Raises:
        ContextLengthError: prompt and new tokens do not fit into the model's context.
        PromptError: the text is of no use.
    """
    config = subject.shape.config() if subject.shape else _config(subject)
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and n_tokens + n_new > limit:
        raise ContextLengthError(
            f"{n_tokens} prompt tokens and {n_new} new ones were requested, but the model's context is {limit}; request fewer."
        )
    if subject.shape is not None:
        return random_prompts(n_tokens, n_prompts, seed)
    assert subject.model is not None
    return cut_prompts(load_tokenizer(subject.model), text, n_tokens, n_prompts)


def _config(subject: Subject) -> Any:
    """Return a checkpoint's configuration, or None for a GGUF file, whose own the contenders read."""
    model = str(subject.model)
    if model.endswith(".gguf"):
        return None
    try:
        return AutoConfig.from_pretrained(model, **NO_CODE)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the model {model!r} cannot be loaded ({reason}); expected a hub id, a checkpoint folder or a GGUF file."
        ) from error


def cut_prompts(tokenizer: Any, text: str | None, n_tokens: int, n_prompts: int) -> list[Prompt]:
    """Cut prompts of ``n_tokens`` tokens from a text; each begins at another of its lines.

    Args:
        tokenizer: of the model.
        text: what to cut from, read in circles if it is short; None: `TEXT`.
        n_tokens: of each prompt, special tokens included.
        n_prompts: how many.

    Raises:
        PromptError: the text is empty, or no part of it has just that many tokens.
    """
    lines = [line.strip() for line in (text.splitlines() if text is not None else TEXT) if line.strip()]
    if not lines:
        raise PromptError("the text that prompts are cut from is empty, expected some lines of text.")
    return [_cut(tokenizer, lines, number % len(lines), n_tokens) for number in range(n_prompts)]


def _cut(tokenizer: Any, lines: list[str], first: int, n_tokens: int) -> Prompt:
    """Cut a prompt from the line ``first`` on: a tokenizer may join what a cut parts, so lengths near it are tried too."""
    n_characters = sum(len(line) + 1 for line in lines)
    n_circles = 1 + 32 * n_tokens // n_characters  # no token is that long on average
    whole = " ".join([*lines[first:], *(lines * n_circles)])
    encoded = tokenizer(whole, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    n_found = len(ends)
    for shift in (0, -1, 1, -2, 2, -3, 3, -4, 4):
        at = n_tokens - 1 + shift
        if 0 <= at < n_found and ends[at] > 0:
            cut = whole[: ends[at]]
            ids = tokenizer(cut, verbose=False)["input_ids"]
            if len(ids) == n_tokens:
                return Prompt(cut, ids)
    raise PromptError(
        f"no prompt of just {n_tokens} tokens can be cut from line {first + 1} of the text, expected a text of which that can; "
        "request another number of tokens or give another text."
    )


def random_prompts(n_tokens: int, n_prompts: int, seed: int) -> list[Prompt]:
    """Draw prompts for `byte_tokenizer`, whose tokens are the characters."""
    chance, tokenizer = random.Random(seed), byte_tokenizer()
    texts = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=n_tokens)) for _ in range(n_prompts)]
    return [Prompt(text, tokenizer(text)["input_ids"]) for text in texts]
