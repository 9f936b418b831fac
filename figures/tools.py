"""What several entries do: run the command line, and take turns."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from figures.table import ROOT, Given

K = TypeVar("K")
UNSEEN = ("dialogsum", "mbpp", "nq_open", "xsum")
"""Sets that no index is built on."""
FILES = click.option(
    "--files",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep GGUF files of the model here for a next time.",
)
"""Option of entries that run llama.cpp."""
AS_SET = {
    "dtype": "model.dtype",
    "prefill": "decode.prefill",
    "fallback": "select.fallback",
    "min_new_tokens": "sample.min_new_tokens",
    "ignore_eos": "sample.ignore_eos",
    "batch_size": "build.batch_size",
}
"""Settings that have no option of their own in this tree, each with the name that ``--set`` knows it by."""


def options(tree: Path = ROOT, **settings: object) -> list[str]:
    """Return settings as the command line of a tree takes them; True is a flag, None is left out."""
    words = []
    for name, value in settings.items():
        if tree == ROOT and name in AS_SET and value is not None:
            words += ["--set", f"{AS_SET[name]}={value}"]
        elif value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def python(tree: Path, code: str, *arguments: object) -> list[str]:
    """Return a command that runs Python with a tree's packages, those of this checkout or of an earlier one."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tree.resolve())!r}); {code}",
        *map(str, arguments),
    ]


def coreinfer(*arguments: object, tree: Path = ROOT) -> list[str]:
    """Return a command that runs a tree's `coreinfer-sim`."""
    return python(tree, "from cli.main import main; main()", *arguments)


def output_of(command: Sequence[str], **env: str) -> str:
    """Run a command, with more in its environment, and return what it prints."""
    more = {**os.environ, **env}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=more).stdout


def peak_of(command: Sequence[str]) -> tuple[str, int]:
    """Run a command; return what it prints and its peak memory in bytes. Linux only."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(command, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        printed.seek(0)
        return printed.read(), usage.ru_maxrss * 1024


def generated(
    given: Given, prompts: str | Sequence[str], *, tree: Path = ROOT, cache: Path | None = None, **settings: object
) -> Any:
    """Return what `generate --json` says of a prompt, or of each of several.

    Args:
        given: model, and new tokens unless ``settings`` name them.
        prompts: of one line each.
        tree: whose command runs, on two threads.
        cache: folder that the command keeps what it makes in; None: an empty one, so that no earlier run's choice is read.
        **settings: see `options`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.txt")
        if not isinstance(prompts, str):
            file.write_text("\n".join(prompts), encoding="utf-8")
        source = [prompts] if isinstance(prompts, str) else ["--file", file]
        settings = {
            "model": given.model,
            "max_new_tokens": getattr(given, "new_tokens", None),
            "json": True,
            **settings,
        }
        threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "2")
        command = coreinfer("generate", *source, *options(tree, **settings), tree=tree)
        return json.loads(output_of(command, COREINFER_SIM_CACHE=str(cache or folder), **threads))


def benched(given: Given, contenders: Iterable[str], llama_bench: Path, files: Path | None) -> dict[str, Any]:
    """Return what `bench --json` says of contenders that take turns, on two threads.

    Args:
        given: model, prompt_tokens, new_tokens and rounds.
        contenders: of `bench`.
        llama_bench: the program that runs llama.cpp's.
        files: where GGUF files of the model are kept for a next time; None: nowhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        sizes = {name: getattr(given, name) for name in ("model", "prompt_tokens", "new_tokens", "rounds")}
        named = [part for each in contenders for part in ("--contender", each)]
        made = options(**sizes, threads=2, llama_bench=llama_bench, folder=files or folder, out=out)
        output_of(coreinfer("bench", *made, *named))
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def sets_of(data: Path, *, seen_only: bool = False) -> list[Path]:
    """Return the JSONL files of a folder, a file a set."""
    return [path for path in sorted(data.glob("*.jsonl")) if not (seen_only and path.stem in UNSEEN)]


def demo_prompts() -> list[str]:
    """Return the ten prompts of the demo."""
    return (ROOT / "demo" / "prompts.txt").read_text(encoding="utf-8").splitlines()


def seconds_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - begin


def in_turns(contenders: Iterable[K], rounds: int, measure: Callable[[K, int], float]) -> dict[K, list[float]]:
    """Return what ``measure(contender, round)`` found for each contender, after a round 0 to warm up.

    Each round begins with another contender.
    """
    found: dict[K, list[float]] = {each: [] for each in contenders}
    order = list(found)
    for number in range(rounds + 1):
        for each in order:
            value = measure(each, number)
            if number:
                found[each].append(value)
        order.append(order.pop(0))
    return found


def medians(found: Mapping[K, Sequence[float]]) -> dict[K, float]:
    """Return the median of each list."""
    return {name: statistics.median(values) for name, values in found.items()}


def spread(values: Iterable[float], digits: int = 2) -> list[float]:
    """Return the lowest and the highest, rounded."""
    known = list(values)
    return [round(min(known), digits), round(max(known), digits)]


def exactly_new(n: int) -> dict[str, Any]:
    """Return options of transformers' generate for ``n`` greedy tokens.

    There is no end token rather than a least length, which costs a pass over all logits that no user pays.
    """
    return {"max_new_tokens": n, "eos_token_id": None, "do_sample": False}


class Clock:
    """A logits processor that notes when each token's logits came."""

    def __init__(self) -> None:
        """Begin anew."""
        self.times: list[float] = []

    def __call__(self, _ids: Any, scores: Any) -> Any:
        """Note the time, and change nothing."""
        self.times.append(time.perf_counter())
        return scores

    @property
    def decode_seconds(self) -> float:
        """From the first token, which is prefill's, to the last."""
        return self.times[-1] - self.times[0]


def decode_speeds(contenders: Mapping[str, Any], ids: Any, given: Given) -> dict[str, list[float]]:
    """Return each round's decode tokens/s by contender, alternating, each after a copy of the first one's prefill.

    Args:
        contenders: a `SparseModel`, then others or models of transformers, which may be of another type.
        ids: prompts, [n_rows, n_positions].
        given: how many tokens and rounds.
    """
    import torch

    reader = next(iter(contenders.values()))
    read = reader.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **exactly_new(1))
    texts, mask = read.sequences, torch.ones_like(read.sequences)  # with one token that is not in the cache yet

    def speed(name: str, _number: int) -> float:
        model = contenders[name]
        cache, clock = copy.deepcopy(read.past_key_values), Clock()
        dtype = getattr(model, "model", model).dtype
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        more = {"past_key_values": cache, "logits_processor": [clock]}
        model.generate(texts, attention_mask=mask, **more, **exactly_new(given.new_tokens))
        return len(ids) * (given.new_tokens - 1) / clock.decode_seconds  # the first token is prefill's

    return in_turns(contenders, given.rounds, speed)
