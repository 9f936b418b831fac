"""Measure exports, llama.cpp and the server; every command writes its figures into ``results/figures-engines.json``.

python figures/figures_engines.py equality --index INDEX
python figures/figures_engines.py equality --shape opt-125m
python figures/figures_engines.py speed --index INDEX
python figures/figures_engines.py perplexity --index INDEX --data DATA
python figures/figures_engines.py load --index INDEX
python figures/figures_engines.py bad-input --index INDEX
"""

from __future__ import annotations

import math
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from figures import record

FILE = "figures-engines.json"
_SCORED = 96
"""Tokens of a row that `perplexity` reads, half of them prompt."""
ROOT = Path(__file__).parent.parent
_COMMAND = (sys.executable, "-c", "from coreinfer_sim_cli.main import main; main()")
model_option = click.option("--model", default="models/smollm2-135m-instruct-q4_1.gguf", show_default=True)
name_option = click.option("--name", default="SmolLM2-135M", show_default=True, help="Of the model, in the figures.")
index_option = click.option("--index", required=True, type=click.Path(exists=True, path_type=Path))


@click.group()
def main() -> None:
    """Measure exports, llama.cpp and the server."""


@contextmanager
def _random_subject(shape: str) -> Iterator[tuple[str, Path]]:
    """Yield a checkpoint of an architecture with random weights, and a small index of it."""
    from coreinfer_sim import build_index
    from coreinfer_sim.base.settings import BuildConfig, CorpusConfig
    from coreinfer_sim.bench.shapes import parse_shape, random_model

    with tempfile.TemporaryDirectory() as folder:
        made = random_model(parse_shape(shape), "float32", "cpu")
        model, index = str(Path(folder, "model")), Path(folder, "index")
        made.model.save_pretrained(model)
        made.tokenizer.save_pretrained(model)
        corpus = CorpusConfig(str(ROOT / "demo/corpus.jsonl"), limit=40, max_tokens=128)
        build_index(model, corpus, index, BuildConfig(clusters=4), dtype="float32")
        yield model, index


@main.command()
@model_option
@name_option
@click.option("--index", type=click.Path(exists=True, path_type=Path))
@click.option("--shape", help="In place of a model and its index: an architecture with random weights.")
@click.option("--keep-ratio", default=0.4, show_default=True)
def equality(model: str, name: str, index: Path | None, shape: str | None, keep_ratio: float) -> None:
    """Logits of an exported checkpoint in stock transformers beside those of our runtime, float32."""
    if (index is None) is (shape is None):
        raise click.UsageError("give either --index or --shape.")
    with _random_subject(shape) if shape is not None else nullcontext((model, index)) as (checkpoint, path):
        worst = _worst_difference(checkpoint, path, keep_ratio)
    title = name if shape is None else f"{shape} (random weights)"
    record(
        FILE,
        f"{title}: logits of an exported checkpoint in stock transformers beside our runtime's, float32",
        float(f"{worst:.2g}"),
        "largest difference over largest logit",
        "at most 0.001",
        worst <= 1e-3,
    )


def _worst_difference(model: str, index: Path, keep_ratio: float) -> float:
    """Return the largest difference of logits over the largest logit, over the demo's prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    from coreinfer_sim import SemanticIndex, load_model
    from coreinfer_sim.engines.compact import installed
    from coreinfer_sim.export.compact import exported_selection
    from coreinfer_sim.export.exporting import export

    language_model, loaded = load_model(model, "float32"), SemanticIndex.load(index)
    prompts = (ROOT / "demo/prompts.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        (path,) = export(language_model, loaded, [0], folder, keep_ratio=keep_ratio)
        stock = AutoModelForCausalLM.from_pretrained(path)
        found = []
        for prompt in prompts:
            ids = language_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                theirs = stock(ids).logits
                with installed(language_model.layers, exported_selection(loaded, 0, keep_ratio)):
                    ours = language_model.model(ids).logits
            found.append((theirs - ours).abs().max() / ours.abs().max())
    return float(torch.stack(found).max())  # which is no number if one of them is none


@main.command()
@model_option
@name_option
@index_option
@click.option("--keep-ratio", default=0.4, show_default=True)
@click.option("--type", "kinds", multiple=True, default=("bf16", "q8_0"), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
def speed(
    model: str, name: str, index: Path, keep_ratio: float, kinds: tuple[str, ...], rounds: int, new_tokens: int
) -> None:
    """Decode of a cluster's GGUF in llama.cpp beside the dense GGUF of the same type, alternating in one run."""
    from coreinfer_sim import SemanticIndex, load_model
    from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
    from coreinfer_sim.export.exporting import export

    language_model, loaded = load_model(model, "stored"), SemanticIndex.load(index)
    prompts = (ROOT / "demo/prompts.txt").read_text(encoding="utf-8").splitlines()[:2]
    bars = {"bf16": 1.7, "q8_0": 1.7, "q4_k_m": 1.5}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            sets = [*sorted({match[0].cluster for match in loaded.lookup(prompts)}), "dense"]
            export(language_model, loaded, sets, folder, keep_ratio=keep_ratio, kind="gguf", weights=kind, router=True)
            speeds: dict[str, list[float]] = {"similarity": [], "dense": []}
            with LlamaCppGenerator(loaded, folder, fallback="none", context=512) as generator:
                for number in range(rounds + 1):  # the first round warms up
                    for mode, found in speeds.items():
                        run = generator.generate(
                            prompts[number % 2], mode=mode, max_new_tokens=new_tokens, ignore_eos=True
                        )
                        if number and run.tokens_per_second:
                            found.append(run.tokens_per_second)
            medians = {mode: statistics.median(found) for mode, found in speeds.items()}
            ratio = round(medians["similarity"] / medians["dense"], 2)
            bar = bars.get(kind, 1.5)
            record(
                FILE,
                f"{name}, keep ratio {keep_ratio:g}, {kind}: decode in llama.cpp over that of the dense GGUF",
                ratio,
                "×, of medians",
                f"at least {bar}",
                ratio >= bar,
                tokens_per_second={mode: round(value, 1) for mode, value in medians.items()},
                spread={mode: [round(min(found), 1), round(max(found), 1)] for mode, found in speeds.items()},
            )


@main.command()
@model_option
@name_option
@index_option
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--keep-ratio", default=0.4, show_default=True)
@click.option("--type", "kinds", multiple=True, default=("bf16", "q8_0"), show_default=True)
@click.option(
    "--sets", default=6, show_default=True, help="JSONL files in DATA to read, with id, prompt and completion."
)
@click.option("--rows", default=2, show_default=True, help="Of each set, from those that no index has seen.")
def perplexity(
    model: str, name: str, index: Path, data: Path, keep_ratio: float, kinds: tuple[str, ...], sets: int, rows: int
) -> None:
    """Perplexity of clusters' GGUFs after a dense prefill over the dense GGUF's, beside our runtime's ratio."""
    from coreinfer_sim import SemanticIndex, load_model
    from coreinfer_sim.engines.compact import installed
    from coreinfer_sim.engines.llamacpp.engine import LlamaCppEngine
    from coreinfer_sim.engines.llamacpp.router import DENSE
    from coreinfer_sim.evaluation.rows import read_rows
    from coreinfer_sim.evaluation.scoring import Case
    from coreinfer_sim.export.compact import exported_selection
    from coreinfer_sim.export.exporting import export

    loaded = SemanticIndex.load(index)
    paths = sorted(data.glob("*.jsonl"))
    found = [
        row for path in paths[:: max(1, len(paths) // sets)][:sets] for row in read_rows(path, range(85, 100), rows)
    ]
    clusters = [match[0].cluster for match in loaded.lookup([row.prompt for row in found])]
    language_model = load_model(model, "stored")
    losses, n_tokens = 0.0, 0
    for row, cluster in zip(found, clusters, strict=True):
        case = Case(language_model, row, _SCORED, 0.4)
        with installed(language_model.layers, exported_selection(loaded, cluster, keep_ratio)):
            score = case.score()
        losses, n_tokens = losses + score.loss - case.reference_loss, n_tokens + score.n_tokens
    ours = math.exp(losses / n_tokens)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            exported = [*sorted(set(clusters)), DENSE]
            export(
                language_model, loaded, exported, folder, keep_ratio=keep_ratio, kind="gguf", weights=kind, router=True
            )
            with closing(LlamaCppEngine(loaded, folder, context=2 * _SCORED)) as engine:
                losses = sum(
                    _loss_in_llamacpp(engine, row, cluster) - _loss_in_llamacpp(engine, row, None)
                    for row, cluster in zip(found, clusters, strict=True)
                )
        theirs = math.exp(losses / n_tokens)
        apart = round(abs(theirs / ours - 1), 4)
        record(
            FILE,
            f"{name}, keep ratio {keep_ratio:g}, {kind}: perplexity over the dense GGUF's in llama.cpp, beside our runtime's",
            apart,
            "relative difference",
            "at most 0.05",
            apart <= 0.05,
            in_llamacpp=round(theirs, 3),
            in_our_runtime=round(ours, 3),
            n_rows=len(found),
            n_tokens=n_tokens,
        )


def _loss_in_llamacpp(engine: Any, row: Any, cluster: int | None) -> float:
    """Return the completion's loss in nats after a dense prefill, its first token left out; cluster None decodes densely."""
    from coreinfer_sim.choosing.selection import NeuronSelection
    from coreinfer_sim.evaluation.rows import joined

    mode = "dense" if cluster is None else "similarity"
    model = engine.model(NeuronSelection(mode, cluster=cluster))
    prompt, completion = (
        model.tokenize(text, add_special=special)
        for text, special in zip(joined(row.prompt, row.completion), (True, False), strict=True)
    )
    prompt, completion = prompt[-_SCORED // 2 :], completion[: _SCORED // 2]
    return -sum(model.score([*prompt, *completion], len(prompt))[1:])


@contextmanager
def _server(model: str, index: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Run the command in a process of its own; yield its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*_COMMAND, "serve", "--index", str(index), "--model", model, "--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Serving"):
                break
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        try:
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


@main.command()
@model_option
@name_option
@index_option
@click.option("--clients", default=64, show_default=True)
@click.option("--seconds", default=120, show_default=True)
@click.option("--new-tokens", default=12, show_default=True)
def load(model: str, name: str, index: Path, clients: int, seconds: int, new_tokens: int) -> None:
    """Many streaming clients at once, some of which hang up; answers are compared with a single client's."""
    import openai
    import psutil

    from coreinfer_sim import SemanticIndex

    prompts = [exemplar for cluster in SemanticIndex.load(index).clusters for exemplar in cluster.exemplars[:1]]
    with _server(model, index, "--queue-limit", str(2 * clients), "--timeout", "600") as (url, pid):

        def ask(text: str, hang_up: bool = False) -> str | None:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900)
            messages: Any = [{"role": "user", "content": text}]
            model_id = client.models.list().data[0].id
            stream = client.chat.completions.create(
                model=model_id, messages=messages, max_tokens=new_tokens, temperature=0, stream=True
            )
            pieces = []
            for part in stream:
                pieces.append(part.choices[0].delta.content or "")
                if hang_up:
                    stream.close()
                    return None
            return "".join(pieces)

        alone = {text: ask(text) for text in prompts}
        process = psutil.Process(pid)
        memory = [process.memory_info().rss]
        end = time.monotonic() + seconds
        counts = {"answers": 0, "hung up": 0, "mixed": 0, "errors": 0}
        lock = threading.Lock()

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
    half = len(memory) // 2
    growth = round(max(memory[half:]) / max(memory[: half or 1]) - 1, 3)
    wrong = counts["mixed"] + counts["errors"]
    title = f"{name}: {clients} streaming clients for {seconds} s"
    record(
        FILE,
        f"{title}: errors and answers other than a single client's",
        wrong,
        f"of {counts['answers'] + wrong} answers; {counts['hung up']} clients hung up midway",
        "0",
        wrong == 0 and counts["answers"] > 0,
    )
    record(
        FILE,
        f"{title}: peak memory in the second half over the first",
        growth,
        "relative growth",
        "at most 0.02",
        growth <= 0.02,
    )


@main.command()
@model_option
@name_option
@index_option
@click.option("--requests", default=10_000, show_default=True, help="Of Schemathesis, about.")
def bad_input(model: str, name: str, index: Path, requests: int) -> None:
    """Requests that Schemathesis draws from the OpenAPI description, sound and broken ones: never a 5xx, never a hang."""
    import httpx

    tool = shutil.which("schemathesis")
    if tool is None:
        raise click.ClickException("schemathesis is not installed; run: pip install schemathesis")
    with _server(model, index, "--max-new-tokens", "2") as (url, _pid):
        description = httpx.get(f"{url}/openapi.json").json()
        n_operations = sum(len(methods) for methods in description["paths"].values())
        command = [tool, "run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--mode", "all", "--no-color"]
        command += [
            "--phases",
            "fuzzing",
            "--request-timeout",
            "60",
            "--continue-on-failure",
            "--suppress-health-check",
            "all",
        ]
        command += ["--max-examples", str(requests // n_operations), "--seed", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        alive = httpx.get(f"{url}/health", timeout=60).status_code == 200
        counted = httpx.get(f"{url}/metrics", timeout=60).text
    print(done.stdout[-2500:])
    drawn = re.search(r"([\d,]+) generated", done.stdout)
    outcomes = {m[1]: int(float(m[2])) for m in re.finditer(r'requests_total{outcome="([^"]+)"} ([\d.]+)', counted)}
    record(
        FILE,
        f"{name}: requests drawn from the OpenAPI description, sound and broken: the server neither fails nor hangs",
        "yes" if done.returncode == 0 and alive else "no",
        f"over {drawn[1] if drawn else requests} requests",
        "yes",
        done.returncode == 0 and alive,
        generated_by="Schemathesis",
        answers=outcomes,
    )


if __name__ == "__main__":
    main()
