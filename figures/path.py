"""The path from corpus to text: a fresh clone, builds, lookups, texts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from figures.record import RESULTS, Bar, at_least, at_most, exactly, record
from figures.table import DEMO_INDEX, DEMO_MODEL, REQUIRED, ROOT, Given, figure
from figures.tools import coreinfer, demo_prompts, generated, options, seconds_of, sets_of, spread

FILE = "figures-path.json"
TEMPLATE = "{prompt}\n{completion}"


@figure(FILE, "git, make, a package index", "15 minutes")
@click.option("--target", "targets", multiple=True, default=("demo", "test"))
def fresh(_given: Given, targets: tuple[str, ...]) -> None:
    """`make demo` and `make test` on a fresh clone in an empty home folder."""
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder, "clone"), Path(folder, "home")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for target in targets:
            begin = time.monotonic()
            done = subprocess.run(["make", target], cwd=clone, env=env, capture_output=True, text=True, check=False)
            seconds, code = round(time.monotonic() - begin), done.returncode
            if code:
                print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
            bar = Bar("exit 0", lambda _seconds, code=code: code == 0)  # type: ignore[misc]
            record(f"make {target} on a fresh clone, empty home", seconds, "s", bar, exit_code=code)


@figure(FILE, "the demo's model", "2 minutes", model=DEMO_MODEL, new_tokens=64)
def dense_equality(given: Given) -> None:
    """Keep ratio 1.0 in float32, greedy: the same tokens as transformers' own generate."""
    import coreinfer_sim

    corpus = [json.loads(line) for line in (ROOT / "demo/corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    loaded = coreinfer_sim.load_model(given.model, "float32")
    generator = coreinfer_sim.load(model=loaded, mode="stability", keep_ratio=1.0)
    length = {"max_new_tokens": given.new_tokens, "min_new_tokens": given.new_tokens}
    n_same, prompts = 0, [row["prompt"] for row in corpus[::20]]
    for prompt in prompts:
        ids = loaded.tokenizer(prompt, return_tensors="pt")
        expected = loaded.model.generate(**ids, **length, do_sample=False)[0, ids["input_ids"].shape[1] :]
        n_same += generator.generate(prompt, **length).token_ids == expected.tolist()
    title = "keep ratio 1.0, float32, greedy: prompts with transformers' own tokens"
    record(title, n_same, f"of {len(prompts)} prompts × {given.new_tokens} tokens", exactly(len(prompts)))


def _mixed_corpus(data: Path, n: int, target: Path) -> Path:
    """Write ``n`` rows, drawn from every set of the folder in turn."""
    files = [path.open(encoding="utf-8") for path in sets_of(data)]

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


@figure(FILE, "DATA", "10 minutes", timed=True, model=DEMO_MODEL, data=REQUIRED, rounds=3)
@click.option("--prompts", "n_prompts", default=2000, help="Of the corpus.")
def recording(given: Given, n_prompts: int) -> None:
    """The recording pass beside a plain batched forward over the same batches, alternating, in one process."""
    import torch

    from coreinfer_sim import BuildConfig, CorpusConfig, SentenceEncoder, load_model
    from coreinfer_sim.base.processes import default_threads
    from coreinfer_sim.base.rows import read_corpus
    from coreinfer_sim.building.shards import batches, cut_into_shards, forward, run_shard
    from coreinfer_sim.fitting.clustered_corpus import ClusteredCorpus
    from coreinfer_sim.index.clustering import cluster_embeddings
    from coreinfer_sim.models.loading import DTYPES, usable

    config = BuildConfig(clusters=24)
    with tempfile.TemporaryDirectory() as folder:
        corpus = _mixed_corpus(given.data, n_prompts, Path(folder, "corpus.jsonl"))
        tokenizer = load_model(given.model).tokenizer
        source = CorpusConfig(str(corpus), prompt_column="prompt", template=TEMPLATE)
        sentences = list(read_corpus(source, lambda texts: tokenizer(texts)["input_ids"])[0])
    embeddings = SentenceEncoder().encode([sentence.prompt for sentence in sentences])
    clustering = cluster_embeddings(embeddings, 24, 0)
    n_tokens = np.array([sentence.n_tokens for sentence in sentences])
    shards = cut_into_shards(clustering.assignment, n_tokens, config.shard_size)
    chosen = shards[:: max(1, len(shards) // (given.rounds + 1))][: given.rounds + 1]  # the first only warms up
    for dtype in ("bfloat16", "float32"):
        if usable(DTYPES[dtype], "cpu") is not DTYPES[dtype]:
            continue  # nobody would build in a type that the processor lacks
        loaded = load_model(given.model, dtype)
        torch.set_num_threads(default_threads("cpu"))
        clustered = ClusteredCorpus(loaded, sentences, clustering, config, 512, Path())
        own, plain = [], []
        for shard in chosen:
            begin = time.perf_counter()
            for batch in batches(clustered, shard):
                forward(loaded, batch)
            middle = time.perf_counter()
            run_shard(clustered, shard)
            plain.append(n_tokens[shard].sum() / (middle - begin))
            own.append(n_tokens[shard].sum() / (time.perf_counter() - middle))
        shares = [float(a / b) for a, b in zip(own[1:], plain[1:], strict=True)]
        record(
            f"language-model pass beside a plain forward over the same batches, {dtype}",
            statistics.median(shares),
            "of its tokens/s, median",
            at_least(0.8),
            spread=spread(shares, 3),
            tokens_per_second={"recording": round(np.median(own[1:])), "plain": round(np.median(plain[1:]))},
            threads=torch.get_num_threads(),
        )


def _build(corpus: Path, given: Given, out: Path, *more: str) -> int:
    """Build an index in a process of its own and return the most memory that it and its workers were seen to hold."""
    shared = ("--prompt-column", "prompt", "--template", TEMPLATE, "--clusters", 24, "--quiet", "--out", out)
    command = coreinfer("build-index", corpus, "--model", given.model, *shared, *more)
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        process = psutil.Process(running.pid)
        while running.poll() is None:
            held = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    held += each.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            peak = max(peak, held)
            time.sleep(0.01)
    if running.returncode:
        raise click.ClickException(f"the build of {out.name} ended with {running.returncode}.")
    return peak


@figure(FILE, "DATA", "30 minutes", model=DEMO_MODEL, data=REQUIRED)
@click.option("--only", type=click.Choice(["memory", "files", "batches"]), help="One of the three.")
def build(given: Given, only: str | None) -> None:
    """Memory as the corpus grows, identical files, and agreement between batch sizes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = _mixed_corpus(given.data, 2000, folder / "large.jsonl")
        small = _mixed_corpus(given.data, 500, folder / "small.jsonl")
        if only in (None, "memory", "files"):
            peak = {"2000": _build(large, given, folder / "large-1", "--workers", "1")}
        if only in (None, "memory"):
            peak["500"] = _build(small, given, folder / "small-1", "--workers", "1")
            growth = peak["2000"] / peak["500"] - 1
            title = "peak memory of a build over 2,000 prompts beside 500"
            mib = {n: round(held / 2**20) for n, held in peak.items()}
            record(title, growth, "relative growth", at_most(0.05), peak_mib=mib)
        if only in (None, "files"):
            _build(large, given, folder / "large-2", "--workers", "2")
            same = _same_files(folder / "large-1", folder / "large-2")
            title = "two builds over 2,000 prompts with 1 and 2 workers: identical files"
            record(title, same, "of 4 files", exactly(4))
        if only in (None, "batches"):
            for size in ("1", "16"):
                _build(small, given, folder / f"batch-{size}", *options(dtype="float32", batch_size=size))
            agreement = _agreement(folder / "batch-1", folder / "batch-16")
            title = "core-neuron ids that agree between batch sizes 1 and 16, float32"
            unit = "share, the smaller of both scores"
            record(title, min(agreement.values()), unit, at_least(0.999), by_score=agreement)


def _same_files(a: Path, b: Path) -> int:
    names = {path.name for path in a.iterdir()} | {path.name for path in b.iterdir()}
    return sum((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def _agreement(a: Path, b: Path) -> dict[str, float]:
    """Return by score the share of core-neuron ids at keep ratio 0.4 that two indexes share."""
    from coreinfer_sim import SemanticIndex

    pair, found = [SemanticIndex.load(path) for path in (a, b)], {}
    for score in ("energy", "paper"):
        same = total = 0
        for cluster in range(len(pair[0])):
            one, other = (index.core_neurons(cluster, 0.4, score) for index in pair)
            same += sum(len(np.intersect1d(ids.numpy(), other[layer].numpy())) for layer, ids in one.items())
            total += sum(map(len, one.values()))
        found[score] = same / total
    return found


@figure(FILE, "", "1 minute", index=DEMO_INDEX)
@click.option("--lookups", default=200, help="Of one prompt.")
def lookup(given: Given, lookups: int) -> None:
    """Latency of a lookup, encoder included, and of one among 256 clusters."""
    from coreinfer_sim import SemanticIndex

    loaded, prompts = SemanticIndex.load(given.index), demo_prompts()
    times = [1000 * seconds_of(loaded.lookup, prompts[i % len(prompts)]) for i in range(lookups + 20)][20:]
    p95 = round(float(np.quantile(times, 0.95)), 2)
    record("lookup of one prompt, encoder included", statistics.median(times), "ms, median", at_most(20), p95=p95)
    vectors = np.random.default_rng(0).normal(size=(256, loaded.manifest.encoder.dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters = [replace(loaded.clusters[0], id=i) for i in range(256)]
    large = SemanticIndex(loaded.manifest, vectors, clusters, {}, "synthetic")
    times = [1000 * seconds_of(large.lookup_embeddings, vectors[i % 256][None]) for i in range(2000)][100:]
    record("lookup of one embedding among 256 clusters", statistics.median(times), "ms, median", at_most(0.2))


@figure(FILE, "the demo's model", "5 minutes", model=DEMO_MODEL, index=DEMO_INDEX, new_tokens=64)
def texts(given: Given) -> None:
    """Ten demo prompts at keep ratios 0.8 and 0.4, and how likely the dense model finds the texts."""
    import torch

    from coreinfer_sim import load_model

    loaded = load_model(given.model)
    written: dict[str, list[dict[str, Any]]] = {}
    surprise = {}
    for name, mode, ratio in (("dense", "dense", None), ("0.8", "similarity", 0.8), ("0.4", "similarity", 0.4)):
        runs = generated(given, demo_prompts(), chat=True, index=given.index, mode=mode, keep_ratio=ratio)
        written[name] = [{"prompt": run["prompt"], "cluster": run["label"], "text": run["text"]} for run in runs]
        losses = []
        for run in runs:
            messages = [{"role": "user", "content": run["prompt"]}]
            asked = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt, new = (
                loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, run["text"])
            )
            with torch.inference_mode():
                logits = loaded.model(torch.tensor([[*prompt, *new]])).logits[0, len(prompt) - 1 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(new)).item())
        surprise[name] = round(float(np.exp(np.mean(losses))), 2)
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    (RESULTS / "demo-texts.json").write_text(text, encoding="utf-8")
    title = "similarity mode at keep ratio 0.8, energy: perplexity of its ten texts under the dense model"
    bar = Bar("reads as sensible English (results/demo-texts.json)", lambda found: found < 10)
    more = {"of_dense_texts": surprise["dense"], "at_keep_ratio_0_4": surprise["0.4"]}
    record(title, surprise["0.8"], f"perplexity, greedy {given.new_tokens} tokens", bar, **more)
