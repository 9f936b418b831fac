"""Choosing what profiles decode by: the fewest bytes a token that keep a promise about perplexity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.rows import Row
from coreinfer_sim.base.settings import MAX_INCREASES, Fallback, Profile
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
    is_whole = part.start == 0 and part.stop == 100
    wider = (
        "or a higher limit" if is_whole else f"a higher limit, or a wider part than {part.start}:{part.stop} of 0:100"
    )
    remedy = f"give more sets, longer completions, {wider}."
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
    stored: str = "16bit",
    by_token: bool = True,
) -> list[Contender]:
    """Return what may decode: of each type of weights sets at each keep ratio, tokens that choose at each read ratio, and all.

    Sets are plain and, where there are some, compensated: compensation that was fitted to few tokens may do more harm than good
    where few neurons are dropped. Each has the fallback that `make_predictor` takes by default.

    Args:
        index: to choose for.
        keep_ratios: of sets to try; none: those of the compensated sets and KEEP_RATIOS, unless read ratios are named.
        read_ratios: to try; none: READ_RATIOS, unless keep ratios are named.
        kinds: of weights, as contenders name them.
        stored: the one of the stored weights, whose dense decode all are compared with.
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
    found = [] if stored in kinds else [Contender("dense", weights=stored)]
    for kind in kinds:
        for ratio in sorted({*keep_ratios}):
            if index.manifest.holds_sets(ratio):
                found.append(Contender("similarity", ratio, weights=kind, fallback=Fallback.GLOBAL, compensated=True))
            found.append(Contender("similarity", ratio, weights=kind, fallback=Fallback.HYBRID))
        found += [*by_token_and_dense(kind, sorted({*read_ratios}))]
    return found


def by_token_and_dense(kind: str, read_ratios: Sequence[float] = READ_RATIOS) -> list[Contender]:
    """Return tokens that choose at each read ratio, and those that read all weights of a type."""
    return [
        *(Contender("all", weights=kind, read_ratio=ratio) for ratio in read_ratios),
        Contender("dense", weights=kind),
    ]


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
    """Return the candidates that may yet keep the promise, and dense decode, whose bytes are needed.

    Args:
        contenders: the candidates.
        summary: of `summarise`, for them.
        max_increase: largest allowed increase of perplexity, as a share of the dense model's.
    """
    low = {row["contender"]: row["ratio_interval"][0] for row in summary if row["ratio_interval"] is not None}
    most = 1 + _FAR * max_increase
    return [each for each in contenders if each.name == "dense" or low.get(str(each), 0.0) <= most]


def choose_profiles(
    contenders: Sequence[Contender],
    summary: Sequence[dict[str, Any]],
    layouts: Mapping[str, str] | None = None,
    max_increases: Mapping[Profile, float] = MAX_INCREASES,
) -> dict[str, ProfileInfo]:
    """Return, for each profile by its name, the contender with the fewest bytes whose whole 95 % interval keeps the promise.

    Of those with about as few, it is the one of the lowest ratio. Dense decode of the stored weights always keeps it.

    Args:
        contenders: the candidates; the first that is dense is of the stored weights.
        summary: of `summarise`, for them, on rows that `check_rows` has passed.
        layouts: by kinds of weights, what `Engine.layout_by_token` says.
        max_increases: by profile, allowed increase of perplexity, as a share of the dense model's.
    """
    by_name = {row["contender"]: row for row in summary}
    rows = [(contender, by_name[str(contender)]) for contender in contenders]
    stored = next((contender, row) for contender, row in rows if contender.name == "dense")
    found = {}
    for profile, most in max_increases.items():
        kept = [stored, *(each for each in rows if each[1]["ratio_interval"][1] <= 1 + most)]
        fewest = min(row["total_bytes_per_token"] for _, row in kept)
        near = [each for each in kept if each[1]["total_bytes_per_token"] <= _SAME_BYTES * fewest]
        chosen, row = min(near, key=lambda each: each[1]["ratio"])
        low, high = row["ratio_interval"]
        found[profile.value] = ProfileInfo(
            chosen.keep_ratio,
            chosen.compensated,
            most,
            row["ratio"],
            low,
            high,
            row["mlp_bytes_per_token"],
            row["n_rows"],
            chosen.read_ratio,
            "stored" if chosen.weights == "16bit" else chosen.weights,
            (layouts or {}).get(chosen.weights, "") if chosen.read_ratio < 1 else "",
            row["total_bytes_per_token"],
            stored[1]["total_bytes_per_token"],
        )
    return found
