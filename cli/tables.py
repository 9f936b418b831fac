"""Tables of scores, for people."""

from __future__ import annotations

from typing import Any

import click


def _width(summary: list[dict[str, Any]]) -> int:
    """Return the characters that the longest contender's name takes."""
    return max([28, *(len(row["contender"]) for row in summary)])


def print_table(summary: list[dict[str, Any]]) -> None:
    """Print a line a contender."""
    width = _width(summary)
    click.echo(
        f"{'contender':{width}s} {'ratio to dense (95 %)':26s} {'KL':>7s} {'top-1':>6s} {'MLP MB':>8s} {'all MB':>8s}"
    )
    for row in summary:
        interval = row["ratio_interval"]
        spread = "" if interval is None else f"({interval[0]:.3f}-{interval[1]:.3f})"
        click.echo(
            f"{row['contender']:{width}s} {row['ratio']:9.3f} {spread:16s} {row['kl']:7.3f} "
            f"{row['same_top']:6.3f} {row['mlp_bytes_per_token'] / 1e6:8.1f} {row['total_bytes_per_token'] / 1e6:8.1f}"
        )


def print_set_table(summary: list[dict[str, Any]]) -> None:
    """Print a line for each contender and set."""
    width = _width(summary)
    click.echo(
        f"\n{'contender':{width}s} {'set':18s} {'perplexity':>10s} {'ratio to dense':>14s} {'KL':>7s} {'top-1':>6s} {'rows':>5s}"
    )
    for row in summary:
        for name, group in row["sets"].items():
            click.echo(
                f"{row['contender']:{width}s} {name:18.18s} {group['perplexity']:10.2f} {group['ratio']:14.3f} "
                f"{group['kl']:7.3f} {group['same_top']:6.3f} {group['n_rows']:5d}"
            )


def print_text_table(summary: list[dict[str, Any]]) -> None:
    """Print what generated texts score, 0 to 100: a line a contender and set, and one for the mean over sets."""
    titles = {"exact_match": "exact", "f1": "F1", "rouge_l": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF"}
    width = _width(summary)
    click.echo(
        f"\n{'contender':{width}s} {'generated texts':18s}" + "".join(f" {title:>7s}" for title in titles.values())
    )
    for row in summary:
        for name, group in [*row["sets"].items(), ("mean over sets", row)]:
            scores = "".join(f" {group['text'][metric]:7.2f}" for metric in titles)
            click.echo(f"{row['contender']:{width}s} {name:18.18s}{scores}")
