"""Which types of transformers' models are supported, and whether our loops decode them faster and with the same tokens."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from collections import Counter
from typing import Any

import click

from figures.record import at_least, exactly, record
from figures.table import REQUIRED, ROOT, Given, figure
from figures.tools import decode_speeds, demo_prompts, exactly_new, medians, spread

FILE = "figures-models.json"
PAGE = ROOT / "docs" / "models.md"
_LEAST = 95
_HEAD = """# Models

What is below is written by `python figures/run.py models-types`, with transformers {version}.

transformers has {n_types} types of models that write text, with or without images before it. Each is made from its own
configuration, with all sizes small and random weights, and tried: its MLPs are found; statistics of their neurons are gathered;
compact MLPs give what masked ones give, and whole ones what dense ones give; it decodes; and afterwards it is what it was. Of a
model that reads images, the text part is what is tried and served.

**{n_supported} types are supported**, {n_mixtures} of them mixtures of experts, **and {n_left_out} are left out**.

## Supported

"plain" is `output(activation(input(x)))`, "gated" is `output(activation(gate(x)) * up(x))`; of "experts" each is one. A norm
behind an MLP stands between it and the residual stream, or behind their sum. {n_lean} types decode on a CPU by compiled loops
("lean"), the others by transformers' own code.

| type | text part | MLPs | engine |
|---|---|---|---|
"""


def _tried() -> dict[str, Any]:
    """Return what came of each type."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    import transformers
    from tiny_types import TYPES, tried

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return {each: tried(each) for each in TYPES}


def _engine(tried: Any) -> str:
    return "lean" if tried.why_slow is None else "transformers"


@figure(FILE, "", "2 minutes")
def types(_given: Given) -> None:
    """Types in transformers, supported and left out; also writes docs/models.md."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = _tried()
    supported = {name: each for name, each in found.items() if each.reason is None}
    left_out = {name: each.reason for name, each in found.items() if each.reason is not None}
    mixtures = sorted(name for name, each in supported.items() if "experts" in each.layout)
    of_text = [name for name in found if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    record("types that write text, in transformers", len(found), f"types of transformers {__version__}")
    record("types for text alone, in transformers", len(of_text), f"types of transformers {__version__}")
    record("types supported", len(supported), "types", at_least(_LEAST), which=sorted(supported))
    lean = sorted(name for name, each in supported.items() if each.why_slow is None)
    slow = {name: each.why_slow for name, each in sorted(supported.items()) if each.why_slow is not None}
    record("types that the compiled loops decode", len(lean), "types", which=lean, others=slow)
    n_of_text = sum(name in supported for name in of_text)
    record("types for text alone that are supported", n_of_text, "types", at_least(_LEAST))
    record("supported types that are mixtures of experts", len(mixtures), "types", which=mixtures)
    record("types left out", len(left_out), "types", which=dict(sorted(left_out.items())))
    layouts = Counter(each.layout for each in supported.values())
    record("layouts of the supported types", len(layouts), "layouts", which=layouts)
    lines = [
        _HEAD.format(
            version=__version__,
            n_types=len(found),
            n_supported=len(supported),
            n_lean=len(lean),
            n_left_out=len(left_out),
            n_mixtures=len(mixtures),
        ),
        *(
            f"| {name} | {each.text_part if each.text_part != name else ''} | {each.layout} | {_engine(each)} |\n"
            for name, each in sorted(supported.items())
        ),
        "\n## Left out\n\n| type | reason |\n|---|---|\n",
        *(f"| {name} | {reason.replace('|', ' ')} |\n" for name, reason in sorted(left_out.items())),
    ]
    PAGE.write_text("".join(line.replace("|  |", "| |") for line in lines), encoding="utf-8")


_SHAPES = (
    *("exaone-4.0-1.2b", "gemma-3-1b", "llama-3.2-1b", "olmo-2-1b", "opt-1.3b"),
    *("phi-1.5", "pythia-1b", "qwen2.5-1.5b", "qwen3-1.7b", "stablelm-2-1.6b"),
)
"""Of ten types, each about a billion weights."""
_PUBLISHED = {
    "what": "PowerInfer over transformers, OPT-6.7B on a TITAN XP, arXiv 2410.18311",
    "tokens_per_second": [7.32, 1.92],
}


@figure(
    FILE, "16 GB of memory", "12 minutes; a minute or two a shape", timed=True,
    prompt_tokens=64, new_tokens=24, rounds=3,
)  # fmt: skip
@click.option("--shape", "shapes", multiple=True, type=click.Choice(_SHAPES), help="Of these alone.")
def speed(given: Given, shapes: tuple[str, ...]) -> None:
    """Dense decode over transformers, ten types of a billion random weights in bfloat16, alternating."""
    from coreinfer_sim.bench.shapes import parse_shape, random_model

    for name in shapes or _SHAPES:
        made = random_model(parse_shape(name), "bfloat16", "cpu")
        kind, model = made.model.config.model_type, made.model
        contenders = {"ours": _dense(model), **_of_transformers(model)}
        found = decode_speeds(contenders, _random_ids(model, given), given)
        middle = medians(found)
        best = max(middle[each] for each in contenders if each != "ours")
        record(
            f"{kind}, {made.name}: dense decode over transformers, the better of bf16 and f32", middle["ours"] / best,
            "×, of medians", at_least(1.25), **_speeds(found),
        )  # fmt: skip
        del made, model, contenders
        gc.collect()


@figure(
    FILE, "16 GB of memory", "3 minutes", timed=True,
    prompt_tokens=64, new_tokens=32, rounds=5,
)  # fmt: skip
@click.option("--shape", default="opt-1.3b", show_default=True, type=click.Choice(["opt-1.3b", "opt-125m"]))
@click.option("--zeros", default=0.9, show_default=True, help="Share of the neurons, by lower biases of the inputs.")
def zeros(given: Given, shape: str, zeros: float) -> None:
    """Decode of random weights with ReLU that skips zeros, over dense decode and over transformers, alternating."""
    from coreinfer_sim.bench.shapes import parse_shape, random_model

    made = random_model(parse_shape(shape), "bfloat16", "cpu")
    model, ids = made.model, _random_ids(made.model, given)
    _lower_biases(made, ids, zeros)
    ours = {name: _dense(model) for name in ("skipped", "all")}
    ours["all"].engines[0]._weights.skips_zeros = False  # the loops that read every neuron
    found = decode_speeds({**ours, **_of_transformers(model)}, ids, given)
    middle = medians(found)
    read = {name: each.latest.read for name, each in ours.items()}
    allowed = read["all"].per_step / read["skipped"].per_step
    facts = {
        "read_ratio": round(read["skipped"].read_ratio, 4),
        "bytes_per_token": {name: each.per_step for name, each in read.items()},
        **_speeds(found),
    }
    title, gained = f"{made.name}, ReLU, {zeros:.0%} of the values zero", middle["skipped"] / middle["all"]
    record(f"{title}: decode that skips them over dense decode", gained, "×, of medians", **facts)
    record(
        f"{title}: decode that skips them over dense decode, beside what the bytes allow", gained / allowed, "share",
        at_least(0.9), allowed=allowed, **facts,
    )  # fmt: skip
    best = max(middle[each] for each in middle if each not in ours)
    record(
        f"{title}: decode that skips them over transformers, the better of bf16 and f32", middle["skipped"] / best,
        "×, of medians", published=_PUBLISHED, **facts,
    )  # fmt: skip


@figure(FILE, "a checkpoint", "6 minutes for 1.5 billion weights", model=REQUIRED, name=None, new_tokens=64)
def tokens(given: Given) -> None:
    """Greedy tokens of dense decode and of transformers, both in float32: three prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import coreinfer_sim
    from coreinfer_sim.generation.in_process import TextGenerator

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prompts = [tokenizer(each, return_tensors="pt")["input_ids"] for each in demo_prompts()[:3]]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32")
    expected = [model.generate(ids, pad_token_id=0, **exactly_new(given.new_tokens)) for ids in prompts]
    del model
    with coreinfer_sim.load(None, given.model, mode="dense", dtype="float32", engine="lean") as generator:
        assert isinstance(generator, TextGenerator)
        sparse = generator.sparse_model()
        found = [sparse.generate(ids, pad_token_id=0, **exactly_new(given.new_tokens)) for ids in prompts]
    n_same = sum(map(_n_same, found, expected, [given.new_tokens] * len(prompts)))
    n_all = len(prompts) * given.new_tokens
    title = f"{given.name}, float32: greedy tokens of dense decode that are transformers'"
    record(title, n_same, f"of {n_all}", exactly(n_all))


@figure(FILE, "", "4 minutes", new_tokens=64)
def tiny_tokens(given: Given) -> None:
    """Greedy tokens of dense decode and of transformers, both in float32: three prompts, a tiny model of every lean type."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_models
    from lean_types import TYPES, model_named

    torch.set_num_threads(1)
    n_all, other = 0, {}
    for name in TYPES:
        model = model_named(name)
        sparse = _dense(model)
        for seed in range(3):
            shape, generator = (1, 9 + 4 * seed), torch.Generator().manual_seed(seed)
            ids = torch.randint(4, tiny_models.VOCABULARY, shape, generator=generator)
            options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **exactly_new(given.new_tokens)}
            n_same = _n_same(sparse.generate(ids, **options), model.generate(ids, **options), given.new_tokens)
            n_all += given.new_tokens
            if n_same < given.new_tokens:
                other[f"{name}, prompt {seed}"] = n_same
    n_other = sum(given.new_tokens - n for n in other.values())
    title = "tiny models of every type that the compiled loops decode, float32: greedy tokens that are transformers'"
    record(title, n_all - n_other, f"of {n_all}", exactly(n_all), types=list(TYPES), other=other)


def _dense(model: Any) -> Any:
    """Return a model that our loops decode, all neurons held."""
    from coreinfer_sim.choosing.predictors import FixedPredictor
    from coreinfer_sim.choosing.selection import NeuronSelection
    from coreinfer_sim.generation.sparse_model import SparseModel

    return SparseModel(model, FixedPredictor(NeuronSelection("dense")), engine="lean")


def _of_transformers(model: Any) -> dict[str, Any]:
    """Return a model in bfloat16 and, where that may not be what is faster, in float32."""
    import torch

    from coreinfer_sim.models.loading import usable

    torch.set_num_threads(2)
    found = {"transformers, bfloat16": model}
    if usable(model.dtype, "cpu") is not model.dtype:
        found["transformers, float32"] = copy.deepcopy(model).float()
    return found


def _random_ids(model: Any, given: Given) -> Any:
    """Return the ids of a prompt, [1, n]."""
    import torch

    shape, generator = (1, given.prompt_tokens), torch.Generator().manual_seed(0)
    return torch.randint(100, model.config.vocab_size, shape, generator=generator)


def _lower_biases(made: Any, ids: Any, zeros: float) -> None:
    """Lower the input biases of each MLP, the same for all its neurons, until a share of them is zero in a text."""
    import torch
    import torch.nn.functional as F

    def lower(module: Any, given: tuple[Any, ...]) -> None:
        values = F.linear(given[0].float(), module.weight.float(), module.bias.float())
        module.bias.sub_(values.flatten().quantile(zeros))

    hooks = [layer.projection(layer.inputs[0]).register_forward_pre_hook(lower) for layer in made.layers]
    with torch.no_grad():
        made.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()


def _speeds(found: dict[str, list[float]]) -> dict[str, Any]:
    """Return median, lowest and highest tokens/s."""
    middle = medians(found)
    return {"tokens_per_second": {name: [round(middle[name], 2), *spread(each)] for name, each in found.items()}}


def _n_same(one: Any, other: Any, n_new: int) -> int:
    """Return how many new tokens two texts begin with alike."""
    return int((one == other)[0, -n_new:].long().cumprod(0).sum())
