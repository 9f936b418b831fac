"""Write the README's tables of figures from the result files, or with --check say whether they are current."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def table(path: Path) -> str:
    """Return a result file as a Markdown table."""
    content = json.loads(path.read_text(encoding="utf-8"))
    machine = content["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; torch "
        f"{content['versions']['torch']}, transformers {content['versions']['transformers']}; {content['date']}.",
        "",
        "| figure | value | bar | holds |",
        "|---|--:|---|---|",
    ]
    for figure in content["figures"]:
        value = f"{figure['value']:,}" if isinstance(figure["value"], int | float) else figure["value"]
        holds = "yes" if figure["holds"] else "**no**"
        lines.append(f"| {figure['name']} | {value} {figure['unit']} | {figure['bar']} | {holds} |")
    return "\n".join(lines) + "\n"


def filled(readme: str) -> str:
    """Return the README with every block of figures made anew."""
    return _BLOCK.sub(lambda m: m[1] + table(ROOT / "benchmarks" / "results" / m[2]) + m[3], readme)


def main() -> None:
    """Fill in the tables, or check them."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            sys.exit("README.md's figures are not those of benchmarks/results; run benchmarks/readme.py")
        return
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
