"""Exports, llama.cpp and the server."""

from __future__ import annotations

import math
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import click

from figures.record import at_least, at_most, exactly, record
from figures.table import DEMO_MODEL, REQUIRED, Given, figure
from figures.tools import coreinfer, demo_prompts, in_turns, medians, sets_of, spread

FILE = "figures-engines.json"
_SCORED = 48
"""Tokens of a prompt's end and of a completion's beginning that `perplexity` reads."""
_OF_EXPORT: dict[str, Any] = {"model": DEMO_MODEL, "name": None, "index": REQUIRED, "keep_ratio": 0.4}
_types = click.option("--type", "kinds", multiple=True, default=("bf16", "q8_0"), help="Of the GGUF files.")


@figure(FILE, "an index", "2 minutes", **_OF_EXPORT)
def equality(given: Given) -> None:
    """Logits of an exported checkpoint in stock transformers beside those of our runtime, float32, over the demo's prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    from coreinfer_sim import DecodeConfig, SemanticIndex, load_model
    from coreinfer_sim.engines.registry import choose_engines
    from coreinfer_sim.export.export import export
    from coreinfer_sim.export.weights import exported_selection

    loaded, index, found = load_model(given.model, "float32"), SemanticIndex.load(given.index), []
    ((engine,), _) = choose_engines(loaded.model, loaded.layers, DecodeConfig(engine="transformers"))
    (held,) = engine.prepare([exported_selection(index, 0, given.keep_ratio)])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        (path,) = export(loaded, index, [0], folder, keep_ratio=given.keep_ratio)
        stock = AutoModelForCausalLM.from_pretrained(path)
        for prompt in demo_prompts():
            ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
            theirs, ours = stock(ids).logits[0], engine.forced(ids, None, held)
            found.append((theirs - ours).abs().max() / ours.abs().max())
    worst = float(torch.stack(found).max())  # which is no number if one of them is none
    title = f"{given.name}: logits of an exported checkpoint in stock transformers beside our runtime's, float32"
    record(title, worst, "largest difference over largest logit", at_most(0.001))


@contextmanager
def _in_llamacpp(given: Given, loaded: Any, index: Any, clusters: Iterable[int], kind: str) -> Iterator[Any]:
    """Export clusters and the dense model as GGUF files of a type, and yield what decodes them in llama.cpp."""
    import coreinfer_sim
    from coreinfer_sim.export.export import export

    with tempfile.TemporaryDirectory() as folder:
        which: list[int | str] = [*sorted(set(clusters)), "dense"]
        export(loaded, index, which, folder, keep_ratio=given.keep_ratio, kind="gguf", weights=kind, router=True)
        settings: dict[str, Any] = {"exported": folder, "fallback": "none", "context": 512}
        with coreinfer_sim.load(index, engine="llamacpp", **settings) as generator:
            yield generator


@figure(FILE, "an index, xllamacpp", "15 minutes", timed=True, **_OF_EXPORT, new_tokens=64, rounds=5)
@_types
def speed(given: Given, kinds: tuple[str, ...]) -> None:
    """Decode of a cluster's GGUF in llama.cpp beside the dense GGUF of the same type, alternating in one run."""
    from coreinfer_sim import SemanticIndex, load_model

    loaded, index, prompts = load_model(given.model, "stored"), SemanticIndex.load(given.index), demo_prompts()[:2]
    clusters = [match[0].cluster for match in index.lookup(prompts)]
    for kind in kinds:
        with _in_llamacpp(given, loaded, index, clusters, kind) as generator:

            def measure(mode: str, number: int, generator: Any = generator) -> float:
                options = {"mode": mode, "max_new_tokens": given.new_tokens, "ignore_eos": True}
                return float(generator.generate(prompts[number % 2], **options).tokens_per_second)

            speeds = in_turns(("similarity", "dense"), given.rounds, measure)
        found = medians(speeds)
        record(
            f"{given.name}, keep ratio {given.keep_ratio:g}, {kind}: decode in llama.cpp over that of the dense GGUF",
            found["similarity"] / found["dense"],
            "×, of medians",
            at_least({"bf16": 1.7, "q8_0": 1.7}.get(kind, 1.5)),
            tokens_per_second={mode: round(value, 1) for mode, value in found.items()},
            spread={mode: spread(values, 1) for mode, values in speeds.items()},
        )


@figure(FILE, "an index, xllamacpp, DATA", "20 minutes", **_OF_EXPORT, data=REQUIRED, rows=2)
@_types
@click.option("--sets", "n_sets", default=6, help="Of DATA to read.")
def perplexity(given: Given, kinds: tuple[str, ...], n_sets: int) -> None:
    """Perplexity of clusters' GGUFs after a dense prefill over the dense GGUF's, beside our runtime's ratio."""
    from coreinfer_sim import NeuronSelection, SemanticIndex, TextGenerator, load_model
    from coreinfer_sim.choosing.predictors import FixedPredictor
    from coreinfer_sim.export.weights import exported_selection

    # 1) rows that nothing has seen, and their clusters
    index, loaded = SemanticIndex.load(given.index), load_model(given.model, "stored")
    texts = _texts(given, n_sets, loaded.tokenizer)
    clusters = [match[0].cluster for match in index.lookup([prompt for prompt, _ in texts])]
    # 2) what their sets cost in our runtime, in nats
    dense, gap, n_tokens = TextGenerator(loaded, predictor=FixedPredictor(NeuronSelection("dense"))), 0.0, 0
    for text, cluster in zip(texts, clusters, strict=True):
        held = FixedPredictor(exported_selection(index, cluster, given.keep_ratio))
        found = [
            each.score(*text)[1:] for each in (dense, TextGenerator(loaded, predictor=held))
        ]  # the first is prefill's
        gap, n_tokens = gap + sum(found[0]) - sum(found[1]), n_tokens + len(found[0])
    ours = math.exp(gap / n_tokens)
    # 3) and in llama.cpp
    for kind in kinds:
        with _in_llamacpp(given, loaded, index, clusters, kind) as generator:
            scores = {
                mode: [generator.score(*text, mode=mode)[1:] for text in texts] for mode in ("dense", "similarity")
            }
        gap = sum(map(sum, scores["dense"])) - sum(map(sum, scores["similarity"]))
        theirs = math.exp(gap / sum(map(len, scores["dense"])))
        title = f"{given.name}, keep ratio {given.keep_ratio:g}, {kind}: perplexity over the dense GGUF's in llama.cpp"
        facts = {"in_llamacpp": round(theirs, 3), "in_our_runtime": round(ours, 3)}
        facts |= {"n_rows": len(texts), "n_tokens": n_tokens}
        record(f"{title}, beside our runtime's", abs(theirs / ours - 1), "relative difference", at_most(0.05), **facts)


def _texts(given: Given, n_sets: int, tokenizer: Any) -> list[tuple[str, str]]:
    """Return prompts' ends and completions' beginnings of some sets, from rows that no index has seen."""
    from coreinfer_sim.evaluation.rows import joined, read_rows

    found, paths = [], sets_of(given.data)
    for path in paths[:: max(1, len(paths) // n_sets)][:n_sets]:
        for row in read_rows(path, range(85, 100), given.rows):
            texts = joined(row.prompt, row.completion)
            prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            found.append((tokenizer.decode(prompt[-_SCORED:]), tokenizer.decode(completion[:_SCORED])))
    return found


@contextmanager
def server(given: Given, *options: str) -> Iterator[tuple[str, int]]:
    """Run `serve` in a process of its own; yield its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = coreinfer("serve", "--index", given.index, "--model", given.model, "--port", port, *options)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Serving"):
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        try:
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


@figure(FILE, "an index, openai", "3 minutes", model=DEMO_MODEL, name=None, index=REQUIRED, new_tokens=12)
@click.option("--clients", default=64)
@click.option("--seconds", default=120)
def load(given: Given, clients: int, seconds: int) -> None:
    """Many streaming clients at once, some of which hang up; answers are compared with a single client's."""
    import openai
    import psutil

    from coreinfer_sim import SemanticIndex

    prompts = [exemplar for cluster in SemanticIndex.load(given.index).clusters for exemplar in cluster.exemplars[:1]]
    counts, lock = {"answers": 0, "hung up": 0, "mixed": 0, "errors": 0}, threading.Lock()
    with server(given, "--queue-limit", str(2 * clients), "--timeout", "600") as (url, pid):
        process = psutil.Process(pid)
        memory = [process.memory_info().rss]

        def ask(text: str, hang_up: bool = False) -> str | None:
            client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900)
            model_id, messages = client.models.list().data[0].id, [{"role": "user", "content": text}]
            options: Any = {"max_tokens": given.new_tokens, "temperature": 0, "stream": True}
            stream = client.chat.completions.create(model=model_id, messages=messages, **options)
            pieces = []
            for part in stream:
                pieces.append(part.choices[0].delta.content or "")
                if hang_up:
                    stream.close()
                    return None
            return "".join(pieces)

        alone = {text: ask(text) for text in prompts}
        end = time.monotonic() + seconds

        def client_of(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < end:
                text, hangs_up = chance.choice(prompts), chance.random() < 0.2
                try:
                    answer = ask(text, hangs_up)
                except Exception as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
                    outcome = "errors"
                else:
                    outcome = "hung up" if answer is None else "answers" if answer == alone[text] else "mixed"
                with lock:
                    counts[outcome] += 1
                    memory.append(process.memory_info().rss)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client_of, range(clients)))
    wrong, title = counts["mixed"] + counts["errors"], f"{given.name}: {clients} streaming clients for {seconds} s"
    if not counts["answers"]:
        raise click.ClickException("no client got an answer, so there is no figure; give them more --seconds.")
    unit = f"of {counts['answers'] + wrong} answers; {counts['hung up']} clients hung up midway"
    record(f"{title}: errors and answers other than a single client's", wrong, unit, exactly(0))
    half = len(memory) // 2
    growth = max(memory[half:]) / max(memory[: half or 1]) - 1
    record(f"{title}: peak memory in the second half over the first", growth, "relative growth", at_most(0.02))


@figure(FILE, "an index, schemathesis", "20 minutes", model=DEMO_MODEL, name=None, index=REQUIRED)
@click.option("--requests", default=10_000, help="Of Schemathesis, about.")
def bad_input(given: Given, requests: int) -> None:
    """Requests that Schemathesis draws from the OpenAPI description, sound and broken ones: never a 5xx, never a hang."""
    import httpx

    tool = shutil.which("schemathesis")
    if tool is None:
        raise click.ClickException("schemathesis is not installed; run: pip install schemathesis")
    with server(given, "--max-new-tokens", "2") as (url, _pid):
        description = httpx.get(f"{url}/openapi.json").json()
        n_operations = sum(len(methods) for methods in description["paths"].values())
        options = "--checks not_a_server_error --mode all --no-color --phases fuzzing --request-timeout 60 "
        options += (
            f"--continue-on-failure --suppress-health-check all --max-examples {requests // n_operations} --seed 1"
        )
        command = [tool, "run", f"{url}/openapi.json", *options.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        alive = httpx.get(f"{url}/health", timeout=60).status_code == 200
        counted = httpx.get(f"{url}/metrics", timeout=60).text
    print(done.stdout[-2500:])
    drawn = re.search(r"([\d,]+) generated", done.stdout)
    outcomes = {m[1]: int(float(m[2])) for m in re.finditer(r'requests_total{outcome="([^"]+)"} ([\d.]+)', counted)}
    record(
        f"{given.name}: requests drawn from the OpenAPI description, sound and broken: the server neither fails nor hangs",
        "yes" if done.returncode == 0 and alive else "no",
        f"over {drawn[1] if drawn else requests} requests",
        exactly("yes"),
        generated_by="Schemathesis",
        answers=outcomes,
    )
