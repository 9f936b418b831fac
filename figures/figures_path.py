"""Measure the path from corpus to text; every command writes its figures into ``results/figures-path.json``.

python figures/figures_path.py COMMAND --model models/smollm2-135m-instruct-q4_1.gguf --data DATA

DATA is a folder of JSONL files with "prompt" and "completion"; prompts are drawn from all of them in turn.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from figures import record

FILE = "figures-path.json"
ROOT = Path(__file__).parent.parent
TEMPLATE = "{prompt}\n{completion}"
model_option = click.option("--model", default="models/smollm2-135m-instruct-q4_1.gguf", show_default=True)
data_option = click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))


def _mixed_corpus(data: Path, n: int, target: Path) -> Path:
    """Write ``n`` rows, drawn from every set of the folder in turn."""
    files = [path.open(encoding="utf-8") for path in sorted(data.glob("*.jsonl"))]

    def turns() -> Iterator[str]:
        while True:
            for file in files:
                if line := file.readline():
                    yield line

    rows = turns()
    with target.open("w", encoding="utf-8") as out:
        for _ in range(n):
            out.write(next(rows))
    return target


@click.group()
def main() -> None:
    """Measure the path from corpus to text."""


@main.command()
@click.option("--target", "targets", multiple=True, default=("demo", "test"), show_default=True)
def fresh(targets: tuple[str, ...]) -> None:
    """`make demo` and `make test` on a fresh clone in an empty home folder."""
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder, "clone"), Path(folder, "home")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for target in targets:
            begin = time.monotonic()
            done = subprocess.run(["make", target], cwd=clone, env=env, capture_output=True, text=True, check=False)
            seconds = round(time.monotonic() - begin)
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
            record(
                FILE,
                f"make {target} on a fresh clone, empty home",
                seconds,
                "s",
                "exit 0",
                done.returncode == 0,
                exit_code=done.returncode,
            )


@main.command()
@model_option
def dense_equality(model: str) -> None:
    """Keep ratio 1.0 in float32, greedy: the same tokens as transformers' own generate."""
    from coreinfer_sim import SparseModel, load_model, make_predictor

    language_model = load_model(model, "float32")
    tokenizer = language_model.tokenizer
    corpus = [json.loads(line) for line in (ROOT / "demo/corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    n_same = 0
    for row in corpus[::20][:20]:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        options: dict[str, Any] = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        expected = language_model.model.generate(**ids, **options)
        sparse = SparseModel(
            language_model.model, make_predictor("stability", language_model.layers, keep_ratio=1.0), tokenizer
        )
        n_same += bool((sparse.generate(**ids, **options) == expected).all())
    record(
        FILE,
        "keep ratio 1.0, float32, greedy: prompts with transformers' own tokens",
        n_same,
        "of 20 prompts × 64 tokens",
        "20",
        n_same == 20,
    )


@main.command()
@model_option
@data_option
@click.option("--rows", default=2000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def lm_pass(model: str, data: Path, rows: int, rounds: int) -> None:
    """The recording pass beside a plain batched forward over the same batches, alternating, in one process."""
    import torch

    from coreinfer_sim import BuildConfig, CorpusConfig, load_model
    from coreinfer_sim.base.corpus import read_corpus
    from coreinfer_sim.base.processes import default_threads
    from coreinfer_sim.building.shards import batches, cut_into_shards, forward, run_shard
    from coreinfer_sim.index.clustering import cluster_embeddings
    from coreinfer_sim.index.encoder import SentenceEncoder
    from coreinfer_sim.models.loading import DTYPES, usable

    config = BuildConfig(clusters=24)
    with tempfile.TemporaryDirectory() as folder:
        source = CorpusConfig(
            str(_mixed_corpus(data, rows, Path(folder, "corpus.jsonl"))), prompt_column="prompt", template=TEMPLATE
        )
        tokenizer = load_model(model).tokenizer
        sentences = list(read_corpus(source, lambda texts: tokenizer(texts)["input_ids"])[0])
        embeddings = SentenceEncoder().encode([sentence.prompt for sentence in sentences])
        assignment = cluster_embeddings(embeddings, 24, 0).assignment
        for dtype in ("bfloat16", "float32"):
            if usable(DTYPES[dtype], "cpu") is not DTYPES[dtype]:
                continue  # nobody would build in a type that the processor lacks
            language_model = load_model(model, dtype)
            torch.set_num_threads(default_threads("cpu"))
            n_tokens = np.array([sentence.n_tokens for sentence in sentences])
            shards = cut_into_shards(assignment, n_tokens, config.shard_size)
            own, plain = [], []
            chosen = shards[:: max(1, len(shards) // (rounds + 1))][: rounds + 1]  # the first only warms up
            for shard in chosen:
                begin = time.perf_counter()
                for batch in batches(language_model, sentences, shard, config.batch_size, 512):
                    forward(language_model, batch)
                middle = time.perf_counter()
                run_shard(language_model, language_model.layers, sentences, assignment, shard, config, 512)
                plain.append(n_tokens[shard].sum() / (middle - begin))
                own.append(n_tokens[shard].sum() / (time.perf_counter() - middle))
            shares = [a / b for a, b in zip(own[1:], plain[1:], strict=True)]
            share = round(float(statistics.median(shares)), 3)
            record(
                FILE,
                f"language-model pass beside a plain forward over the same batches, {dtype}",
                share,
                "of its tokens/s, median",
                "at least 0.8",
                share >= 0.8,
                spread=[round(float(min(shares)), 3), round(float(max(shares)), 3)],
                tokens_per_second={
                    "recording": round(float(np.median(own[1:]))),
                    "plain": round(float(np.median(plain[1:]))),
                },
                threads=torch.get_num_threads(),
            )


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@main.command("build-once", hidden=True)
@click.argument("corpus")
@click.argument("model")
@click.argument("out")
@click.option("--workers", default=1)
@click.option("--batch-size", default=16)
@click.option("--dtype", default="auto")
def build_once(corpus: str, model: str, out: str, workers: int, batch_size: int, dtype: str) -> None:
    """Build one index and print this process's peak memory in bytes."""
    from coreinfer_sim import BuildConfig, CorpusConfig, build_index

    build_index(
        model,
        CorpusConfig(corpus, prompt_column="prompt", template=TEMPLATE),
        out,
        BuildConfig(clusters=24, batch_size=batch_size),
        dtype=dtype,
        workers=workers,
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _build(corpus: Path, model: str, out: Path, *options: str) -> int:
    """Build in a process of its own and return its peak memory."""
    command = [sys.executable, __file__, "build-once", str(corpus), model, str(out), *options]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@main.command()
@model_option
@data_option
@click.option("--only", type=click.Choice(["memory", "files", "batches"]), help="One of the three.")
def build(model: str, data: Path, only: str | None) -> None:
    """Memory as the corpus grows, identical files, and agreement between batch sizes."""
    from coreinfer_sim import SemanticIndex

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = _mixed_corpus(data, 2000, folder / "large.jsonl")
        small = _mixed_corpus(data, 500, folder / "small.jsonl")
        if only != "batches":
            peak_small = _build(small, model, folder / "small-1")
            peak_large = _build(large, model, folder / "large-1")
            _record_memory(peak_small, peak_large)
        if only in (None, "files"):
            _build(large, model, folder / "large-2", "--workers", "2")
            same = _same_files(folder / "large-1", folder / "large-2")
            record(
                FILE,
                "two builds over 2,000 prompts with 1 and 2 workers: identical files",
                same,
                "of 4 files",
                "4",
                same == 4,
            )
        if only in ("memory", "files"):
            return
        for batch_size in (1, 16):
            options = ("--dtype", "float32", "--batch-size", str(batch_size))
            _build(small, model, folder / f"batch-{batch_size}", *options)
        pair = [SemanticIndex.load(folder / f"batch-{size}") for size in (1, 16)]
        agreement = {score: _agreement(*pair, score) for score in ("energy", "paper")}
        worst = min(agreement.values())
        record(
            FILE,
            "core-neuron ids that agree between batch sizes 1 and 16, float32",
            round(worst, 6),
            "share, the smaller of both scores",
            "at least 0.999",
            worst >= 0.999,
            by_score={score: round(value, 6) for score, value in agreement.items()},
        )


def _record_memory(peak_small: int, peak_large: int) -> None:
    growth = round(peak_large / peak_small - 1, 4)
    record(
        FILE,
        "peak memory of a build over 2,000 prompts beside 500",
        growth,
        "relative growth",
        "at most 0.05",
        growth <= 0.05,
        peak_mib={"500": round(peak_small / 2**20), "2000": round(peak_large / 2**20)},
    )


def _same_files(a: Path, b: Path) -> int:
    names = {path.name for path in a.iterdir()} | {path.name for path in b.iterdir()}
    return sum((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def _agreement(a: Any, b: Any, score: str) -> float:
    """Return the share of core-neuron ids at keep ratio 0.4 that two indexes share."""
    same = total = 0
    for cluster in range(len(a)):
        one, other = (index.core_neurons(cluster, 0.4, score) for index in (a, b))
        for layer, ids in one.items():
            same += len(np.intersect1d(ids.numpy(), other[layer].numpy()))
            total += len(ids)
    return same / total


@main.command()
@click.option("--index", default="indexes/smollm2-135m-demo", show_default=True)
@click.option("--rounds", default=200, show_default=True)
def lookup(index: str, rounds: int) -> None:
    """Latency of a lookup, and of `coreinfer-sim --help`."""
    from coreinfer_sim import SemanticIndex
    from coreinfer_sim.index.clustering import faiss_index

    loaded = SemanticIndex.load(index)
    prompts = (ROOT / "demo/prompts.txt").read_text(encoding="utf-8").splitlines()
    times = [_seconds(lambda i=i: loaded.lookup(prompts[i % len(prompts)])) * 1e3 for i in range(rounds + 20)][20:]
    median = round(statistics.median(times), 2)
    record(
        FILE,
        "lookup of one prompt, encoder included",
        median,
        "ms, median",
        "at most 20",
        median <= 20,
        p95=round(float(np.quantile(times, 0.95)), 2),
    )
    dimension = loaded.manifest.encoder.dimension
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(256, dimension)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    large = SemanticIndex(
        loaded.manifest, centroids, [replace(loaded.clusters[0], id=i) for i in range(256)], {}, "synthetic"
    )
    assert faiss_index(centroids).ntotal == len(large)
    times = [_seconds(lambda i=i: large.lookup_embeddings(centroids[i % 256 : i % 256 + 1])) * 1e3 for i in range(2000)]
    median = round(statistics.median(times[100:]), 4)
    record(
        FILE,
        "lookup of one embedding among 256 clusters",
        median,
        "ms, median",
        "at most 0.2",
        median <= 0.2,
    )
    command = shutil.which("coreinfer-sim", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert command is not None

    def show_help() -> None:
        subprocess.run([command, "--help"], check=True, capture_output=True)

    median = round(statistics.median([_seconds(show_help) for _ in range(10)]), 3)
    record(FILE, "coreinfer-sim --help", median, "s, median", "at most 0.5", median <= 0.5)


@main.command()
@model_option
@click.option("--index", default="indexes/smollm2-135m-demo", show_default=True)
def texts(model: str, index: str) -> None:
    """Ten demo prompts at keep ratios 0.8 and 0.4, and how likely the dense model finds the texts."""
    import torch

    from coreinfer_sim import SemanticIndex, TextGenerator, load_model, make_predictor

    language_model = load_model(model)
    loaded = SemanticIndex.load(index)
    prompts = (ROOT / "demo/prompts.txt").read_text(encoding="utf-8").splitlines()
    settings = {"dense": ("dense", None), "0.8": ("similarity", 0.8), "0.4": ("similarity", 0.4)}
    written: dict[str, list[dict[str, Any]]] = {}
    surprise = {}
    for name, (mode, keep_ratio) in settings.items():
        generator = TextGenerator(
            language_model, make_predictor(mode, language_model.layers, loaded, keep_ratio=keep_ratio)
        )
        runs = [generator.generate(prompt, chat=True, max_new_tokens=64, do_sample=False) for prompt in prompts]
        written[name] = [{"prompt": r.prompt, "cluster": r.selection.label, "text": r.text} for r in runs]
        losses = []
        for run in runs:
            messages = [{"role": "user", "content": run.prompt}]
            ids = language_model.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            whole = torch.cat([ids, torch.tensor([run.token_ids])], 1)
            with torch.inference_mode():
                logits = language_model.model(whole).logits[0, ids.shape[1] - 1 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, whole[0, ids.shape[1] :]).item())
        surprise[name] = round(float(np.exp(np.mean(losses))), 2)
    path = Path(__file__).parent / "results" / "demo-texts.json"
    path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    record(
        FILE,
        "similarity mode at keep ratio 0.8, energy: perplexity of its ten texts under the dense model",
        surprise["0.8"],
        "perplexity, greedy 64 tokens",
        "reads as sensible English (results/demo-texts.json)",
        surprise["0.8"] < 10,
        of_dense_texts=surprise["dense"],
        at_keep_ratio_0_4=surprise["0.4"],
    )


if __name__ == "__main__":
    main()
