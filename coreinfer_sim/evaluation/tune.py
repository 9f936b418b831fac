"""Choosing the keep ratio: the fewest bytes a token that keep a promise about perplexity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import Fallback
from coreinfer_sim.evaluation.contenders import Contender
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import ProfileInfo

READ_RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Tried with every type of weights."""
KEEP_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Tried beside those of the index's compensated sets."""
_FIRST_SHARE = 4
_FAR = 2.0
"""A candidate is dropped early if its whole interval is beyond so many times the promise: on few rows it is too narrow."""
_SAME_BYTES = 1.005
"""Up to so many times the fewest bytes count as the same: sets of one keep ratio differ by rounded numbers of neurons."""
FEWEST_ROWS = 10
"""From fewer a bootstrap draws intervals that are too narrow."""
FEWEST_OF_SET = 2
"""One row of a set tells nothing of how its rows differ."""


def check_rows(set_names: Iterable[str], part: range) -> None:
    """Raise ConfigError if there are too few rows to promise anything on.

    Args:
        set_names: of each row, the name of its set.
        part: of the 100 parts into which ids hash, those that the rows were taken from.
    """
    n_rows = Counter(set_names)
    taken = f"{part.start}:{part.stop} of 0:100"
    remedy = f"give more sets, longer completions, a higher limit, or a wider part than {taken}."
    if n_rows.total() < FEWEST_ROWS:
        verb = "is" if n_rows.total() == 1 else "are"
        raise ConfigError(
            f"there {verb} {counted(n_rows.total(), 'row')} to tune on, expected {FEWEST_ROWS} or more with two completion "
            f"tokens, as a promise needs an interval; {remedy}"
        )
    few = sorted(name for name, n in n_rows.items() if n < FEWEST_OF_SET)
    if few:
        raise ConfigError(
            f"there is one row of {', '.join(few)}, expected {FEWEST_OF_SET} or more of every set with two completion tokens, as "
            f"a promise needs an interval; leave the set out, or {remedy}"
        )


def candidates(
    index: SemanticIndex,
    keep_ratios: Sequence[float] = (),
    read_ratios: Sequence[float] = (),
    kinds: Sequence[str] = ("16bit",),
    by_token: bool = True,
) -> list[Contender]:
    """Return what may decode: of each type of weights, sets at each keep ratio, and tokens that choose at each read ratio.

    Sets are plain and, where there are some, compensated: compensation that was fitted to few tokens may do more harm than good
    where few neurons are dropped. Each has the fallback that `make_predictor` takes by default.

    Args:
        index: to choose for.
        keep_ratios: of sets to try; none: those of the compensated sets and KEEP_RATIOS, unless read ratios are named.
        read_ratios: to try; none: READ_RATIOS, unless keep ratios are named.
        kinds: of weights, as contenders name them; rounded ones are tried densely too.
        by_token: whether the engine lets tokens choose.

    Raises:
        ConfigError: a ratio of 1 or more.
    """
    for what, ratios in (("keep", keep_ratios), ("read", read_ratios)):
        whole = [ratio for ratio in ratios if ratio >= 1]
        if whole:
            raise ConfigError(f"the {what} ratio {whole[0]:g} is dense decode, expected one below 1; leave it out.")
    if not keep_ratios and not read_ratios:
        keep_ratios = [*KEEP_RATIOS, *(info.keep_ratio for info in index.manifest.compensation)]
        read_ratios = READ_RATIOS if by_token else ()
    found = []
    for kind in kinds:
        for ratio in sorted({*keep_ratios}):
            if index.manifest.holds_sets(ratio):
                found.append(Contender("similarity", ratio, weights=kind, fallback=Fallback.GLOBAL, compensated=True))
            found.append(Contender("similarity", ratio, weights=kind, fallback=Fallback.HYBRID))
        found += [Contender("all", weights=kind, read_ratio=ratio) for ratio in sorted({*read_ratios})]
        if kind not in ("16bit", "stored"):
            found.append(Contender("dense", weights=kind))
    return found


def first_and_further(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Divide rows into the first quarter of each set, on which hopeless candidates show, and the others, if that is enough."""
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        by_set.setdefault(row.set_name, []).append(row)
    n_first = {name: max(FEWEST_OF_SET, -(-len(group) // _FIRST_SHARE)) for name, group in by_set.items()}
    if sum(n_first.values()) < FEWEST_ROWS:
        return list(rows), []
    first = [row for name, group in by_set.items() for row in group[: n_first[name]]]
    return first, [row for name, group in by_set.items() for row in group[n_first[name] :]]


def hopeful(contenders: Sequence[Contender], summary: Sequence[dict[str, Any]], max_increase: float) -> list[Contender]:
    """Return the candidates that may yet keep the promise; arguments as for `choose_profile`."""
    low = {row["contender"]: row["ratio_interval"][0] for row in summary if row["ratio_interval"] is not None}
    return [contender for contender in contenders if low.get(str(contender), 0.0) <= 1 + _FAR * max_increase]


def choose_profile(
    contenders: Sequence[Contender],
    summary: Sequence[dict[str, Any]],
    max_increase: float,
    dense_bytes: int,
    layouts: Mapping[str, str] | None = None,
) -> ProfileInfo:
    """Return the contender with the fewest bytes whose whole 95 % interval keeps the promise, or dense decode.

    Of those with about as few, it is the one of the lowest ratio.

    Args:
        contenders: the candidates.
        summary: of `summarise`, for them, on rows that `check_rows` has passed.
        max_increase: allowed increase of perplexity, as a share of the dense model's.
        dense_bytes: MLP bytes a token of the dense model.
        layouts: by kinds of weights, what `Engine.layout_by_token` says.
    """
    by_name = {row["contender"]: row for row in summary}
    kept = [
        (row["total_bytes_per_token"], row["ratio"], contender)
        for contender in contenders
        if (row := by_name[str(contender)])["ratio_interval"][1] <= 1 + max_increase
    ]
    if not kept:
        n_rows = max(row["n_rows"] for row in summary)
        return ProfileInfo(1.0, False, max_increase, 1.0, 1.0, 1.0, dense_bytes, n_rows)
    fewest = min(n_bytes for n_bytes, _, _ in kept)
    _, ratio, chosen = min((f for f in kept if f[0] <= _SAME_BYTES * fewest), key=lambda found: found[1])
    row = by_name[str(chosen)]
    low, high = row["ratio_interval"]
    return ProfileInfo(
        chosen.keep_ratio,
        chosen.compensated,
        max_increase,
        ratio,
        low,
        high,
        row["mlp_bytes_per_token"],
        row["n_rows"],
        chosen.read_ratio,
        "stored" if chosen.weights == "16bit" else chosen.weights,
        (layouts or {}).get(chosen.weights, "") if chosen.read_ratio < 1 else "",
    )
