"""The server under several clients, and in a long conversation."""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from figures.engines import server
from figures.record import at_least, at_most, exactly, record
from figures.table import DEMO_INDEX, DEMO_MODEL, Given, figure
from figures.tools import demo_prompts, in_turns, medians, spread

FILE = "figures-findings.json"
_FEW, _MANY = range(2, 7), range(48, 53)
"""Turns whose first tokens are compared; several, as one is a matter of chance."""


def _stream(url: str, messages: list[dict[str, str]], most: int, mode: str | None) -> tuple[float, str, int]:
    """Return the seconds until the first piece of an answer, all of it, and its tokens."""
    import httpx

    body: dict[str, Any] = {
        "model": "model",
        "messages": messages,
        "max_tokens": most,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if mode is not None:
        body["coreinfer"] = {"mode": mode}
    pieces: list[str] = []
    first, n_tokens, begin = 0.0, 0, time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as answer:
        if answer.status_code != 200:
            raise click.ClickException(answer.read().decode())
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line[6:])
            n_tokens = (part.get("usage") or {}).get("completion_tokens", n_tokens)
            for choice in part.get("choices", ()):
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - begin
                    pieces.append(choice["delta"]["content"])
    return first, "".join(pieces), n_tokens


@figure(
    FILE, "an index", "3 minutes", timed=True,
    model=DEMO_MODEL, name=None, index=DEMO_INDEX, new_tokens=64, rounds=3,
)  # fmt: skip
@click.option("--clients", default=4, show_default=True)
@click.option("--mode", help="Of every request.  [default: the server's]")
def clients(given: Given, clients: int, mode: str | None) -> None:
    """Tokens a second of several clients at a time over those of one at a time, and whether their texts are the same."""
    prompts = demo_prompts()[: 2 * clients]
    with server(given, "--name", "model", "--parallel", str(clients)) as (url, _pid):
        texts: dict[int, list[str]] = {}

        def ask(prompt: str) -> tuple[float, str, int]:
            return _stream(url, [{"role": "user", "content": prompt}], given.new_tokens, mode)

        def measure(n_clients: int, _number: int) -> float:
            begin = time.perf_counter()
            with ThreadPoolExecutor(n_clients) as pool:
                answers = list(pool.map(ask, prompts))
            texts[n_clients] = [text for _, text, _ in answers]
            return sum(n_tokens for _, _, n_tokens in answers) / (time.perf_counter() - begin)

        found = in_turns((1, clients), given.rounds, measure)
    middle = medians(found)
    title = f"{given.name}, {mode or 'the index’s own mode'}: {clients} clients at a time"
    speeds = {f"{each} at a time": spread(values, 1) for each, values in found.items()}
    record(f"{title} over one: tokens a second", middle[clients] / middle[1], "×, of medians", at_least(1.5),
           tokens_per_second=speeds)  # fmt: skip
    same = sum(one == other for one, other in zip(texts[1], texts[clients], strict=True))
    record(f"{title}: texts that are those of one", same, f"of {len(prompts)}", exactly(len(prompts)))


@figure(FILE, "an index", "3 minutes", timed=True, model=DEMO_MODEL, name=None, index=DEMO_INDEX, new_tokens=16)
def turns(given: Given) -> None:
    """Time to the first token at turn 50 of a conversation over that at turn 2; each turn sends all that was said."""
    asked, first = demo_prompts(), dict[int, float]()
    messages: list[dict[str, str]] = []
    with server(given, "--name", "model") as (url, _pid):
        for turn in range(1, _MANY.stop):
            messages.append({"role": "user", "content": asked[turn % len(asked)]})
            first[turn], text, _ = _stream(url, messages, given.new_tokens, None)
            messages.append({"role": "assistant", "content": text})
    few, many = ([first[turn] for turn in part] for part in (_FEW, _MANY))
    seconds = {
        f"turns {part.start} to {part.stop - 1}": spread([first[turn] for turn in part], 3) for part in (_FEW, _MANY)
    }
    title = f"{given.name}: first token at turn 50 of a conversation over that at turn 2"
    n_words = sum(len(each["content"].split()) for each in messages)
    record(title, statistics.median(many) / statistics.median(few), "×, of medians", at_most(1.5),
           seconds=seconds, words=n_words)  # fmt: skip
