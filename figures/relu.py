"""A ReLU model: what decode passes over because it is zero, and what that costs and gives."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from figures.record import Bar, at_most, record
from figures.table import REQUIRED, Given, figure
from figures.tools import demo_prompts, generated, in_turns, medians, sets_of, spread

FILE = "figures-token.json"
_KINDS = ("stored", "int8", "int4")
_kinds = click.option("--weights", "kinds", multiple=True, default=_KINDS, show_default=True)


@figure(
    FILE, "a checkpoint with ReLU, DATA", "20 minutes for 135 million weights",
    model=REQUIRED, name=None, data=REQUIRED, rows=2, max_tokens=256,
)  # fmt: skip
@_kinds
def quality(given: Given, kinds: tuple[str, ...]) -> None:
    """KL per token, to the model's own code in float32, of decode that skips zeros and of decode that reads all neurons."""
    import torch
    import torch.nn.functional as F

    from coreinfer_sim.base.decode_settings import DecodeConfig
    from coreinfer_sim.base.settings import Weights
    from coreinfer_sim.choosing.selection import NeuronSelection
    from coreinfer_sim.engines.lean.engine import LeanEngine
    from coreinfer_sim.models.loading import load_model

    exact, stored = load_model(given.model, "float32"), load_model(given.model, "stored")
    texts = list(_texts(given, exact.tokenizer))

    def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(logits[:-1].float(), -1)

    with torch.inference_mode():
        references = [log_probabilities(exact.model(input_ids=ids).logits[0]) for ids in texts]
    n_tokens = sum(map(len, references))
    for kind in ("float32", *kinds):
        model = exact if kind == "float32" else stored
        found: dict[bool, float] = {}
        for skips in (True, False):
            engine = LeanEngine(
                model.model, model.layers, DecodeConfig(weights=Weights("stored" if kind == "float32" else kind))
            )
            if not engine.skips_zeros:
                raise click.ClickException(
                    f"there is no figure, as {given.model} has no ReLU that decode skips zeros of."
                )
            engine._weights.skips_zeros = skips  # False: the loops that read every neuron
            (held,) = engine.prepare([NeuronSelection("dense")])
            made = (log_probabilities(engine.forced(ids, None, held)) for ids in texts)
            of_texts = [
                F.kl_div(own, of, reduction="sum", log_target=True) for own, of in zip(made, references, strict=True)
            ]
            found[skips] = float(torch.stack(of_texts).sum()) / n_tokens
            read = engine.read()
            engine.close()
            if skips:
                share, n_bytes = read.read_ratio, read.mlp_per_step
        of_bytes = n_bytes / read.mlp_per_step
        facts = {"n_tokens": n_tokens, "n_texts": len(texts), "kl_of_all_neurons": found[False], "mlp_bytes": n_bytes}
        title = f"{given.name}, {kind}, what is zero is skipped"
        unit = f"nats; {found[False]:.2g} where all neurons are read"
        record(
            f"{title}: KL per token to the model's own code in float32",
            found[True],
            unit,
            _near(kind, found[False]),
            **facts,
        )
        record(f"{title}: share of the neurons that are zero", 1 - share, "of d_ff", **facts)
        record(
            f"{title}: bytes that a token reads of the MLPs",
            of_bytes,
            "of those that dense decode reads",
            at_most(1),
            **facts,
        )


def _near(kind: str, of_all: float) -> Bar:
    """Return the bar: floats lose nothing; of codes, output rows are rounded in other blocks, which is not to cost a fifth."""
    return at_most(of_all + 1e-6) if kind in ("float32", "stored") else at_most(1.2 * of_all)


def _texts(given: Given, tokenizer: Any) -> Iterator[Any]:
    """Yield the ids [1, n] of the first rows of each set."""
    for path in sets_of(given.data):
        with path.open(encoding="utf-8") as lines:
            for _, line in zip(range(given.rows), lines, strict=False):
                row = json.loads(line)
                text = f"{row['prompt']}\n{row['completion']}"
                yield tokenizer(text, return_tensors="pt").input_ids[:, : given.max_tokens]


@figure(
    FILE, "a checkpoint with ReLU", "15 minutes for 135 million weights", timed=True,
    model=REQUIRED, name=None, new_tokens=128, rounds=5,
)  # fmt: skip
@_kinds
def speed(given: Given, kinds: tuple[str, ...]) -> None:
    """Decode that skips zeros over dense decode of the same weights under another activation: processes that take turns."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"skipped": Path(given.model).resolve(), "dense": Path(folder, "dense")}
        _with_silu(models["skipped"], models["dense"])
        for kind in kinds:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in models}

            def measure(
                what: str, number: int, kind: str = kind, runs: dict[str, list[dict[str, Any]]] = runs
            ) -> float:
                own = Given(model=str(models[what]), new_tokens=given.new_tokens)
                settings: dict[str, Any] = {"mode": "dense", "weights": kind, "engine": "lean", "ignore_eos": True}
                made = generated(own, demo_prompts()[:1] * 6, cache=Path(folder, "cache"), **settings)
                runs[what] += made if number else []
                return statistics.median(run["tokens_per_second"] for run in made)

            found = in_turns(models, given.rounds, measure)
            middle = medians(found)
            (skipped, dense) = (runs[what][0] for what in models)
            record(
                f"{given.name}, {kind}, what is zero is skipped: decode over dense decode", middle["skipped"] / middle["dense"],
                "×, of medians", None,
                read_ratio=skipped["read_ratio"], skips_zeros=[skipped["skips_zeros"], dense["skips_zeros"]],
                mlp_bytes={what: runs[what][0]["mlp_bytes_per_token"] for what in models},
                tokens_per_second={what: [middle[what], *spread(found[what])] for what in models},
            )  # fmt: skip


def _with_silu(source: Path, target: Path) -> None:
    """Make a checkpoint of the same weights whose activation is SiLU: no neuron is zero, and decode reads them all."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "hidden_act": "silu"}), encoding="utf-8")
