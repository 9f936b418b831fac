"""Reading by token: quality at the bytes that are read, and speed beside llama.cpp built for the same processor."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from figures.record import RESULTS, Bar, at_least, at_most, record, slug, write
from figures.table import REQUIRED, Given, figure
from figures.tools import FILES, benched, coreinfer, output_of, sets_of

FILE = "figures-token.json"
_KINDS = ("16bit", "int8", "int4")
_RATIOS = (0.3, 0.4, 0.5, 0.6)
_PEERS = {"bf16": "llamacpp:bf16", "int8": "llamacpp:q8_0", "int4": "llamacpp:q4_0", "stored": "llamacpp:file"}
_FASTER = {"bf16": 1.6, "int8": 1.25, "int4": 1.05, "stored": 1.8}


@figure(
    FILE, "DATA", "1 hour for 135 million weights",
    model=REQUIRED, name=None, data=REQUIRED, rows=6, max_tokens=512,
)  # fmt: skip
@click.option("--read-ratio", "read_ratios", type=float, multiple=True, default=(0.6, 0.5, 0.4), show_default=True)
@click.option("--weights", "kinds", multiple=True, default=_KINDS, show_default=True)
def quality(given: Given, read_ratios: tuple[float, ...], kinds: tuple[str, ...]) -> None:
    """KL per token and perplexity, to dense 16-bit weights, and the share of the dense MLP bytes that a token reads."""
    named = [part for kind in kinds for part in ("--weights", kind)]
    named += [part for ratio in read_ratios for part in ("--read-ratio", ratio)]
    seen = sets_of(given.data, seen_only=True)
    rows = _evaluated(given, seen, ["--contender", "dense", "--contender", "all", *named])
    facts = {"rows_per_set": given.rows, "n_sets": len(seen), "max_tokens": given.max_tokens}
    for kind in kinds:
        dense = rows[f"dense {kind}"]
        _record(f"{given.name}, {kind}, dense", dense, dense, **facts)
        for ratio in read_ratios:
            own = "" if kind == "16bit" else f" {kind}"
            row = rows[f"all 1 read {ratio:g}{own}"]
            _record(f"{given.name}, {kind}, read ratio {ratio:g}", row, dense, **facts)
            title = f"{given.name}, {kind}: share of the neurons that tokens read on unseen rows, at a read ratio of {ratio:g}"
            within = Bar(f"within 0.02 of {ratio:g}", lambda value, ratio=ratio: abs(value - ratio) <= 0.02)
            record(title, row["read_ratio"], "of d_ff", within, **facts)


def _record(title: str, row: dict[str, Any], dense: dict[str, Any], **facts: Any) -> None:
    share = row["mlp_bytes_per_token"] / dense["mlp_bytes_per_token"]
    record(
        f"{title}: KL per token", row["kl"], f"nats, at {share:.2f} of the dense MLP bytes", None,
        share_of_bytes=share, ratio=row["ratio"], ratio_interval=row["ratio_interval"], same_top=row["same_top"],
        mlp_bytes=row["mlp_bytes_per_token"], **facts,
    )  # fmt: skip


@figure(
    FILE, "an index that was built with build.refit, DATA", "10 minutes for 135 million weights",
    model=REQUIRED, name=None, index=REQUIRED, data=REQUIRED, rows=8, max_tokens=192,
)  # fmt: skip
def refit(given: Given) -> None:
    """KL per token with refitted output rows over KL without them, by the same thresholds and at the same bytes."""
    from coreinfer_sim.index.checks import read_manifest
    from coreinfer_sim.index.manifest import REFIT_FILE
    from coreinfer_sim.index.storage import write_manifest

    manifest, seen = read_manifest(given.index), sets_of(given.data, seen_only=True)
    if manifest.refit is None:
        raise click.ClickException(f"{given.index} holds no refitted rows; build it with --set build.refit=0.4")
    ratio = manifest.refit.read_ratio
    with tempfile.TemporaryDirectory() as folder:
        without = Path(folder, "without")
        shutil.copytree(given.index, without, ignore=shutil.ignore_patterns(REFIT_FILE))
        files = {name: entry for name, entry in manifest.files.items() if name != REFIT_FILE}
        write_manifest(without, replace(manifest, refit=None, files=files))
        contender = ("--contender", "all", "--read-ratio", ratio)
        found = [_evaluated(given, seen, [*contender, "--index", each]) for each in (given.index, without)]
    with_rows, plain = (next(iter(rows.values())) for rows in found)
    what = ("kl", "ratio", "ratio_interval", "same_top", "read_ratio", "mlp_bytes_per_token")
    record(
        f"{given.name}, 16bit, read ratio {ratio:g}: KL per token with refitted output rows over that without",
        with_rows["kl"] / plain["kl"], "×", None,
        refitted={name: with_rows[name] for name in what}, plain={name: plain[name] for name in what},
        refit_tokens=manifest.refit.tokens, rows_per_set=given.rows, n_sets=len(seen), max_tokens=given.max_tokens,
    )  # fmt: skip


@figure(
    FILE, "DATA; GGUF files that llama-quantize has made of MODEL; altair", "2 hours",
    model=REQUIRED, name=None, index=None, data=REQUIRED, rows=2, max_tokens=256,
)  # fmt: skip
@click.option("--read-ratio", "read_ratios", type=float, multiple=True, default=_RATIOS, show_default=True)
@click.option("--weights", "kinds", multiple=True, default=_KINDS, show_default=True)
@click.option("--file", "files", type=click.Path(exists=True, dir_okay=False, path_type=Path), multiple=True)
@click.option("--keep-ratio", "keep_ratios", type=float, multiple=True, default=(0.4, 0.6, 0.8), show_default=True)
def frontier(
    given: Given,
    read_ratios: tuple[float, ...],
    kinds: tuple[str, ...],
    files: tuple[Path, ...],
    keep_ratios: tuple[float, ...],
) -> None:
    """Quality over the bytes that a token reads: by token beside dense files, and with --index beside its static sets."""
    from coreinfer_sim.evaluation.contenders import parse_contenders
    from coreinfer_sim.evaluation.plot import plot

    # 1) by token and densely, then static sets
    seen, every = sets_of(given.data, seen_only=True), (*kinds, *(str(file) for file in files))
    parts = [(("dense", "all"), every, ("--read-ratio", read_ratios), parse_contenders(
        ("dense", "all"), (1.0,), ("energy",), every, read_ratios=read_ratios
    ))]  # fmt: skip
    if given.index is not None:
        parts.append((("similarity",), kinds, ("--keep-ratio", keep_ratios), parse_contenders(
            ("similarity",), keep_ratios, ("energy",), kinds
        )))  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for names, weights, ratios, _ in parts:
        crossed = (("--contender", names), ("--weights", weights), ratios)
        arguments = [part for option, values in crossed for value in values for part in (option, value)]
        if names == ("similarity",):
            arguments += ["--index", given.index]
        rows |= _evaluated(given, seen, arguments)
    # 2) draw and write
    contenders = [contender for *_, own in parts for contender in own]
    stem = f"reading-frontier-{slug(given.name)}"
    plot(list(rows.values()), contenders, RESULTS / f"{stem}.svg")
    points = sorted(rows.values(), key=lambda row: row["total_bytes_per_token"])
    write(f"{stem}.json", {"rows_per_set": given.rows, "max_tokens": given.max_tokens, "points": points})
    # 3) which of ours no dense point beats in bytes and KL
    dense = [row for row in points if row["contender"].startswith("dense")]
    for row in points:
        if not row["contender"].startswith("all"):
            continue
        better = [
            each["contender"]
            for each in dense
            if each["total_bytes_per_token"] <= row["total_bytes_per_token"] and each["kl"] <= row["kl"]
        ]
        record(
            f"{given.name}: {row['contender']}: dense contenders with fewer bytes a token and a smaller KL", len(better),
            f"of {len(dense)}", None,
            KL=row["kl"], bytes_per_token=row["total_bytes_per_token"], better=better, rows_per_set=given.rows,
        )  # fmt: skip


def _evaluated(given: Given, sets: Sequence[Path], arguments: Sequence[object]) -> dict[str, dict[str, Any]]:
    """Run `evaluate` on rows that nothing has seen, and return its summary by contender."""
    shared = ("--model", given.model, "--limit", given.rows, "--max-tokens", given.max_tokens, "--part", "85:100")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "evaluated.json")
        output_of(coreinfer("evaluate", *sets, *shared, *arguments, "--out", out))
        return {row["contender"]: row for row in json.loads(out.read_text(encoding="utf-8"))["contenders"]}


@figure(
    FILE, "a checkpoint, or a GGUF file as it is stored; llama-bench built here", "10 minutes", timed=True,
    model=REQUIRED, name=None, prompt_tokens=128, new_tokens=64, rounds=5,
)  # fmt: skip
@click.option("--llama-bench", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--read-ratio", type=float, default=0.5, show_default=True)
@click.option("--weights", type=click.Choice(list(_PEERS)), default="bf16", show_default=True)
@FILES
def speed(given: Given, llama_bench: Path, read_ratio: float, weights: str, files: Path | None) -> None:
    """Decode that reads by token over dense decode and over llama.cpp with the same type of weights."""
    ours, dense, theirs = (
        f"all:weights={weights}:read_ratio={read_ratio:g}",
        f"ours-dense:weights={weights}",
        _PEERS[weights],
    )
    result = benched(given, (ours, dense, theirs), llama_bench, files)
    rows = {row["contender"]: row for row in result["contenders"]}
    missing = [f"{row['contender']}: {row['error']}" for row in rows.values() if "error" in row]
    if missing:
        raise click.ClickException(f"there is no figure, as {'; '.join(missing)}")
    what = (
        "first_token_seconds",
        "tokens_per_second",
        "tokens_per_second_lowest",
        "tokens_per_second_highest",
        "bytes_per_token",
        "peak_bytes",
    )
    facts = {"of_each": {name: {key: row[key] for key in what} for name, row in rows.items()}}
    facts["bandwidth_gb_per_s"] = result["bandwidth_gb_per_s"]
    facts |= {"crashed": rows[theirs]["crashed"]} if "crashed" in rows[theirs] else {}
    title = f"{given.name}, {given.prompt_tokens} tokens of context, {weights} at a read ratio of {read_ratio:g}: decode over"
    for peer_name, bar in ((theirs, at_least(_FASTER[weights])), (dense, None)):
        ratio = rows[ours]["tokens_per_second"] / rows[peer_name]["tokens_per_second"]
        record(f"{title} {peer_name}", ratio, "×, of medians", bar, **facts)
    first = rows[theirs]["first_token_seconds"] / rows[ours]["first_token_seconds"]
    record(f"{title} {theirs}: speed of the first token", first, "×, of medians", at_least(1), **facts)
    memory = rows[ours]["peak_bytes"] / rows[dense]["peak_bytes"]
    record(f"{title} {dense}: peak memory", memory, "×", at_most(1.2), **facts)
