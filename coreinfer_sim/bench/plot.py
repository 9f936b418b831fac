"""Decode speed as a picture: a bar a contender, with spread, beside what the machine's bandwidth would allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coreinfer_sim.base.plots import drawing


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw tokens/s of what `bench` returned; contenders that failed are left out.

    Args:
        result: of `bench`.
        path: a .png or .svg file; replaced in one step.
    """
    rows = [row for row in result["contenders"] if "error" not in row]
    speeds = [row["tokens_per_second"] for row in rows]
    spread = [
        [row["tokens_per_second"] - row["tokens_per_second_lowest"] for row in rows],
        [row["tokens_per_second_highest"] - row["tokens_per_second"] for row in rows],
    ]
    limits = [1e9 * result["bandwidth_gb_per_s"]["highest"] / row["bytes_per_token"] for row in rows]
    places = list(range(len(rows)))
    with drawing(path, width=9, height=1.6 + 0.5 * len(rows)) as (figure, axes):
        axes.barh(places, speeds, xerr=spread, capsize=3)
        axes.scatter(limits, places, marker="|", s=200, color="black", label="what memory bandwidth allows")
        names = [f"{row['contender']}\n{row['bytes_per_token'] / 1e6:,.0f} MB a token" for row in rows]
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlabel("decoded tokens per second (median, lowest and highest)")
        axes.set_title(f"{result['model']}, {result['prompt_tokens']} + {result['new_tokens']} tokens", fontsize=10)
        figure.legend(loc="outside lower right", fontsize=8)


def plot_growth(series: dict[str, dict[str, list[tuple[int, float]]]], title: str, path: Path) -> None:
    """Draw tokens/s over something that grows, a line a contender.

    Args:
        series: by what grows, then by contender: (how much, tokens/s).
        title: of the picture.
        path: a .png or .svg file; replaced in one step.
    """
    with drawing(path, width=10, height=4.5, n_axes=len(series)) as (figure, axes):
        each = axes.flat if len(series) > 1 else [axes]
        for one, (what, lines) in zip(each, series.items(), strict=True):
            for name, points in lines.items():
                one.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
            one.set_xscale("log", base=2)
            one.set_ylim(bottom=0)
            one.set_xlabel(what)
            one.set_ylabel("decoded tokens per second")
            one.grid(alpha=0.3)
            one.legend(fontsize=8)
        figure.suptitle(title, fontsize=10)
