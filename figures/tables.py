"""Write the tables of figures here and in docs from the result files, or with --check say whether they are current."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures.record import NO_BAR
from figures.table import ROOT
from figures.tools import UNSEEN

# "with bars" leaves out the figures that are there for comparison alone
# and "of X" all but those whose names begin with X, which are shown with their intervals
_BLOCK = re.compile(r"(<!-- figures: (\S+)( with bars| of [^>\n]+)? -->\n).*?(<!-- /figures -->)", re.DOTALL)


def table(path: Path, bars_only: bool = False) -> str:
    """Return a result file as a Markdown table, with a note for figures that were measured elsewhere."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "bandwidth_gb_per_s" in content:
        return _speeds(content)
    if "points" in content:
        return _points(content)
    if "contenders" in content:
        return _contenders(content)
    if "groupings" in content:
        return _groupings(content)
    lines = [f"{_where(content)}.", "", "| figure | value | bar | holds |", "|---|--:|---|---|"]
    elsewhere: list[str] = []
    for figure in content["figures"]:
        if bars_only and figure["bar"] == NO_BAR:
            continue
        note = ""
        if "measured" in figure:
            place = _where(figure["measured"])
            if place not in elsewhere:
                elsewhere.append(place)
            note = f" ({elsewhere.index(place) + 1})"
        value = f"{figure['value']:,}" if isinstance(figure["value"], int | float) else figure["value"]
        holds = "–" if figure["bar"] == NO_BAR else "yes" if figure["holds"] else "**no**"
        lines.append(f"| {figure['name']}{note} | {value} {figure['unit']} | {figure['bar']} | {holds} |")
    lines += ["", *(f"({number}) {place}.  " for number, place in enumerate(elsewhere, 1))] if elsewhere else []
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _contenders(content: dict[str, Any]) -> str:
    """Return what `evaluate` wrote: a row a contender, with geometric means over the sets, and the best and the worst of them."""
    rows = content["contenders"]
    seen, unseen = ([each for each in rows[0]["sets"] if (each in UNSEEN) is apart] for apart in (False, True))
    lines = [f"{_where(content)}; up to {content['rows_per_set']} rows of each set. Perplexity ratios.", ""]
    lines += [f"| contender | the {len(seen)} indexed | the {len(unseen)} unseen | best set | worst set |"]
    lines += ["|---|--:|--:|---|---|"]
    for row in rows:
        ratios = {each: found["ratio"] for each, found in row["sets"].items()}
        means = [math.exp(sum(math.log(ratios[each]) for each in group) / len(group)) for group in (seen, unseen)]
        ends = [f"{choose(ratios, key=ratios.__getitem__)} {choose(ratios.values()):,.2f}" for choose in (min, max)]
        lines.append(" | ".join([f"| {row['contender']}", *(f"{value:,.2f}" for value in means), *ends]) + " |")
    return "\n".join(lines) + "\n"


def _groupings(content: dict[str, Any]) -> str:
    """Return a comparison of ways to group texts: a row a way, beside one set for all."""
    lines = [f"{_where(content)}; up to {content['rows_per_set']} rows of each set.", ""]
    lines += ["| groups | how many | of one data set | the 15 indexed | log gap over one set's | the 4 unseen |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    one = content["groupings"]["one set"]
    for way, found in content["groupings"].items():
        lines.append(
            f"| {way} | {found['groups']} | {found['of_leading_set']:.0%} | {math.exp(found['log_gap']):.2f} | "
            f"{found['log_gap'] / one['log_gap']:.2f} | {math.exp(found['log_gap_unseen']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def _points(content: dict[str, Any]) -> str:
    """Return what `frontier` wrote: a row a point, by bytes; bold, what no point with fewer bytes does as well as."""
    lines = [f"{_where(content)}; up to {content['rows_per_set']} rows of each set.", ""]
    lines += [
        "| contender | MB a token | of the MLPs | KL per token | perplexity ratio | 95 % interval |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    best = float("inf")
    for row in content["points"]:
        mark = "**" if row["ratio"] < best else ""
        best = min(best, row["ratio"])
        interval = row["ratio_interval"]
        spread = "–" if interval is None else f"{interval[0]:,.2f}–{interval[1]:,.2f}"
        kl = "–" if row.get("kl") is None else f"{row['kl']:.3f}"
        lines.append(
            f"| {mark}{row['contender']}{mark} | {row['total_bytes_per_token'] / 1e6:,.0f} | "
            f"{row['mlp_bytes_per_token'] / 1e6:,.0f} | {kl} | {row['ratio']:,.3f} | {spread} |"
        )
    return "\n".join(lines) + "\n"


def _speeds(content: dict[str, Any]) -> str:
    """Return what `bench` wrote: a row a contender."""
    highest = content["bandwidth_gb_per_s"]["highest"]
    lines = [
        f"{content['model']}, {content['prompt_tokens']} prompt tokens, {content['new_tokens']} new ones, median of "
        f"{content['rounds']} rounds; memory is read at {highest:.1f} GB/s at best. {_where(content)}.",
        "",
        "| contender | tokens/s (lowest–highest) | first token | peak memory | MB a token | share of bandwidth |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in content["contenders"]:
        if "error" in row:
            lines.append(f"| {row['contender']} | not measured: {row['error']} | | | | |")
            continue
        slowest, fastest = row["tokens_per_second_lowest"], row["tokens_per_second_highest"]
        share = row["tokens_per_second"] * row["bytes_per_token"] / (highest * 1e9)
        lines.append(
            f"| {row['contender']} | {row['tokens_per_second']:.1f} ({slowest:.1f}–{fastest:.1f}) | "
            f"{1000 * row['first_token_seconds']:,.0f} ms | {row['peak_bytes'] / 1e6:,.0f} MB | "
            f"{row['bytes_per_token'] / 1e6:,.0f} | {share:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _where(measured: dict[str, Any]) -> str:
    machine, versions = measured["machine"], measured["versions"]
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    processor = f"{machine['processor']}{_widest(machine)}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    versions = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"{gpu}{processor}; {versions}; {measured['date']}"


def _widest(machine: dict[str, Any]) -> str:
    """Return, in brackets, the instructions that decide how fast weights are multiplied, of machines that name them."""
    names = {
        "amx_int8": "AMX",
        "avx512_vnni": "AVX-512 VNNI",
        "avx512f": "AVX-512",
        "avx_vnni": "AVX-VNNI",
        "avx2": "AVX2",
    }
    found = [name for flag, name in names.items() if flag in machine.get("instructions", ())]
    return f" ({found[0]})" if found else ""


def filled(page: str) -> str:
    """Return a page with every block of figures made anew."""

    def made(found: re.Match[str]) -> str:
        path, which = ROOT / "figures" / "results" / found[2], (found[3] or "").strip()
        own = _with_intervals(path, which.removeprefix("of ")) if which.startswith("of ") else table(path, bool(which))
        return found[1] + own + found[4]

    return _BLOCK.sub(made, page)


def _with_intervals(path: Path, prefix: str) -> str:
    """Return the figures whose names begin with ``prefix``, with their intervals."""
    content = json.loads(path.read_text(encoding="utf-8"))
    own = [each for each in content["figures"] if each["name"].startswith(prefix)]
    places = {_where(each.get("measured", content)): None for each in own}
    lines = [f"{'; '.join(places)}.", "", "| figure | value | 95 % interval |", "|---|--:|---|"]
    for figure in own:
        low, high = figure["low"], figure["high"]
        spread = "–" if low is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {figure['name'].removeprefix(prefix).strip(' ,:')} | {figure['value']:.4g} | {spread} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill in the tables, or check them."""
    for path in (ROOT / "figures" / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if "--check" not in sys.argv[1:]:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"the figures in {path.relative_to(ROOT)} are not those of figures/results; run figures/tables.py")


if __name__ == "__main__":
    main()
