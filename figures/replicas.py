"""Replicas of the server behind Ray Serve: their memory, requests a second, and one that is killed under load."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil

from figures.record import at_most, exactly, record
from figures.table import REQUIRED, ROOT, Given, figure
from figures.tools import demo_prompts, spread

_N_CLIENTS = 4
_WITHIN = 300.0
"""Seconds that an answer may take."""
_UNDER_LOAD = 60.0
"""Seconds that clients go on asking behind a kill."""


@contextmanager
def _deployed(given: Given, replicas: int) -> Iterator[str]:
    """Run replicas that share out this machine's cores, and return their address."""
    import ray
    from ray import serve

    from coreinfer_sim.serving.on_ray import app

    n_cores = os.cpu_count() or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(num_cpus=n_cores, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        threads = max(1, n_cores // replicas)
        arguments = {"index": str(given.index.resolve()), "model": given.model, "name": "model"}
        arguments |= {"replicas": str(replicas), "threads": str(threads)}
        serve.run(app(arguments), logging_config={"log_level": "ERROR"})
        yield f"http://127.0.0.1:{port}/v1/completions"
        serve.shutdown()
    finally:
        ray.shutdown()


def _processes() -> list[psutil.Process]:
    """Return the replicas' processes."""
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if " ".join(each.info["cmdline"] or ()).startswith("ray::ServeReplica:")]


def _ask(address: str, given: Given, prompt: str) -> str | None:
    """Return the greedy text of a prompt, or None if the answer was an error."""
    import httpx

    body = {"prompt": prompt, "max_tokens": given.new_tokens, "temperature": 0}
    try:
        answer = httpx.post(address, json=body, timeout=_WITHIN)
    except httpx.HTTPError:
        return None
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None


@figure(
    "figures-scale.json", "an index; Ray Serve", "10 minutes for 1.5 billion weights", timed=True,
    model=REQUIRED, name=None, index=REQUIRED, new_tokens=24, rounds=3,
)  # fmt: skip
def two(given: Given) -> None:
    """Two replicas beside one: memory and requests a second of four clients; then one of the two is killed under load."""
    prompts = demo_prompts()
    memory: dict[int, int] = {}
    rates: dict[int, list[float]] = {}
    for replicas in (1, 2):
        with _deployed(given, replicas) as address, ThreadPoolExecutor(_N_CLIENTS) as clients:
            expected = dict(zip(prompts, clients.map(lambda each: _ask(address, given, each), prompts), strict=True))
            for _ in range(given.rounds):
                begin = time.perf_counter()
                texts = list(clients.map(lambda each: _ask(address, given, each), prompts))
                rates.setdefault(replicas, []).append(len(texts) / (time.perf_counter() - begin))
            memory[replicas] = sum(each.memory_full_info().pss for each in _processes())
            if replicas == 2:
                outcome = _killed(given, address, expected)
    middle = {each: sorted(found)[len(found) // 2] for each, found in rates.items()}
    title = f"{given.name}, two replicas behind Ray Serve"
    facts: dict[str, Any] = {"bytes": {f"{each} replicas": size for each, size in memory.items()}}
    record(f"{title} over one: memory, shared pages counted once", memory[2] / memory[1], "×", at_most(1.2), **facts)
    per_second = {f"{each} replicas": spread(found, 3) for each, found in rates.items()}
    record(f"{title} over one: requests a second of {_N_CLIENTS} clients", middle[2] / middle[1], "×, of medians",
           requests_per_second=per_second, new_tokens=given.new_tokens)  # fmt: skip
    answers = f"of {outcome['answers']} answers"
    record(f"{title}, one killed under load: wrong texts", outcome["wrong"], answers, exactly(0))
    record(f"{title}, one killed under load: lost requests", outcome["lost"], answers, at_most(_N_CLIENTS))


def _killed(given: Given, address: str, expected: dict[str, str | None]) -> dict[str, int]:
    """Kill one replica while clients ask, and count what becomes of their requests then and in the time after."""
    over, outcomes = threading.Event(), []

    def client(number: int) -> None:
        for prompt in itertools.islice(itertools.cycle(expected), number, None):
            if over.is_set():
                return
            text = _ask(address, given, prompt)
            outcomes.append("lost" if text is None else "right" if text == expected[prompt] else "wrong")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(_N_CLIENTS)]
    for each in threads:
        each.start()
    time.sleep(_UNDER_LOAD / 6)
    min(_processes(), key=lambda each: each.pid).kill()
    time.sleep(_UNDER_LOAD)
    over.set()
    for each in threads:
        each.join()
    counts = {kind: outcomes.count(kind) for kind in ("right", "wrong", "lost")}
    return {**counts, "answers": len(outcomes)}
