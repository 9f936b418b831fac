"""Problems with one right answer: how many of them a model solves when its tokens choose what they read, and densely."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click
import numpy as np

from figures.record import Bar, record
from figures.table import REQUIRED, Given, figure

FILE = "figures-token.json"
_AT_ONCE = 8
_TASK = "\nThink step by step. End with a line that holds '#### ' and the answer, a number."


@figure(
    FILE, "DATA with gsm8k.jsonl", "2 hours for 1.5 billion weights",
    model=REQUIRED, name=None, data=REQUIRED, rows=200, new_tokens=256,
)  # fmt: skip
@click.option("--read-ratio", type=float, default=0.4, show_default=True)
@click.option("--weights", default="stored", show_default=True)
def gsm8k(given: Given, read_ratio: float, weights: str) -> None:
    """Problems of GSM8K solved by token less those solved densely, in points, with the 95 % interval of the paired difference."""
    from coreinfer_sim.evaluation.rows import read_rows

    rows = read_rows(given.data / "gsm8k.jsonl", range(85, 100), given.rows)
    wanted = [_number(row.completion) for row in rows]
    prompts = [row.prompt + _TASK for row in rows]
    solved = {}
    for what, settings in (("dense", {"mode": "dense"}), ("by token", {"mode": "all", "read_ratio": read_ratio})):
        texts = _answers(given, prompts, weights=weights, **settings)
        solved[what] = np.array([_number(text) == right for text, right in zip(texts, wanted, strict=True)])
    difference = 100 * (solved["by token"].astype(float) - solved["dense"])
    half = 1.96 * difference.std(ddof=1) / len(rows) ** 0.5
    interval = [round(difference.mean() - half, 2), round(difference.mean() + half, 2)]
    record(
        f"{given.name}, {weights}, read ratio {read_ratio:g}: problems of GSM8K solved, less those solved densely",
        float(difference.mean()), "points",
        Bar("lower end of the 95 % interval above -5", lambda _: bool(interval[0] > -5)),
        interval=interval, n_problems=len(rows), n_new_tokens=given.new_tokens,
        solved={what: int(found.sum()) for what, found in solved.items()},
        differ=int((difference != 0).sum()),
    )  # fmt: skip


def _answers(given: Given, prompts: Sequence[str], **settings: Any) -> list[str]:
    """Return greedy answers, a batch at a time."""
    import torch

    import coreinfer_sim
    from coreinfer_sim.generation.in_process import TextGenerator
    from coreinfer_sim.models.prompts import prompt_ids

    torch.set_num_threads(2)
    answers: list[str] = []
    with coreinfer_sim.load(None, given.model, **settings) as generator:
        assert isinstance(generator, TextGenerator)
        sparse, tokenizer = generator.sparse_model(), generator.language_model.tokenizer
        for begin in range(0, len(prompts), _AT_ONCE):
            ids = [prompt_ids(tokenizer, given.name, each, True)[0] for each in prompts[begin : begin + _AT_ONCE]]
            longest = max(map(len, ids))
            batch = torch.zeros(len(ids), longest, dtype=torch.int64)
            mask = torch.zeros_like(batch)
            for row, own in enumerate(ids):
                batch[row, longest - len(own) :], mask[row, longest - len(own) :] = own, 1
            output = sparse.generate(
                batch, attention_mask=mask, max_new_tokens=given.new_tokens, do_sample=False, pad_token_id=0
            )
            answers += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            click.echo(f"{len(answers)} of {len(prompts)} answers", err=True)
    return answers


def _number(text: str) -> float | None:
    """Return what stands behind the last ``####`` of a text, or its last number."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked)
    if not found:
        return None
    return float((found[0] if marked is not text else found[-1]).replace(",", ""))
