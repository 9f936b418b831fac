"""Results that a report shows: what evaluation, tuning and the benchmark have written as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.bench.plot import speed_chart
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.evaluation.plot import quality_chart


@dataclass(frozen=True)
class Measured:
    """One file of results, as a chart and a table."""

    title: str
    is_speed: bool
    """Whether of speed; else of quality."""
    chart: Any
    heads: list[str]
    rows: list[list[str]]
    notes: list[str]


def read_measured(path: Path) -> Measured:
    """Read a file of results.

    Raises:
        ConfigError: it is none.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return _speed(path, content) if "bandwidth_gb_per_s" in content else _quality(path, content["contenders"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}), expected a file of results.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ConfigError) as error:
        found = "no JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else "other JSON"
        raise ConfigError(
            f"{path} holds no results (it is {found}), expected JSON that evaluate, tune or bench wrote; leave it out, or write "
            "it anew."
        ) from error


def _quality(path: Path, rows: list[dict[str, Any]]) -> Measured:
    contenders = [Contender.named(row["contender"]) for row in rows]
    heads = ["contender", "perplexity over dense", "95 %", "KL (nats)", "same top token", "MB a token"]
    table = [
        [
            row["contender"],
            f"{row['ratio']:,.3f}",
            "" if row["ratio_interval"] is None else " to ".join(f"{end:,.3f}" for end in row["ratio_interval"]),
            f"{row['kl']:.4f}",
            f"{row['same_top']:.1%}",
            f"{row['total_bytes_per_token'] / 1e6:,.1f}",
        ]
        for row in rows
    ]
    return Measured(path.name, False, quality_chart(rows, contenders), heads, table, [])


def _speed(path: Path, content: dict[str, Any]) -> Measured:
    measured = [row for row in content["contenders"] if "error" not in row]
    heads = ["contender", "tokens/s", "lowest to highest", "first token", "MB a token", "peak MB"]
    table = [
        [
            row["contender"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second_lowest']:.1f} to {row['tokens_per_second_highest']:.1f}",
            f"{1000 * row['first_token_seconds']:.0f} ms",
            f"{row['bytes_per_token'] / 1e6:,.1f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        for row in measured
    ]
    failed = [f"{row['contender']} was not measured: {row['error']}" for row in content["contenders"] if "error" in row]
    failed += [f"{row['contender']}: {row['crashed']}" for row in measured if "crashed" in row]
    rounds, threads = counted(content["rounds"], "round"), counted(content["threads"], "thread")
    machine = f"{rounds} on {threads} of {content['machine']['processor']}"
    return Measured(path.name, True, speed_chart(content), heads, table, [machine, *failed])
