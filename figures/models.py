"""Which types of transformers' models are supported: each is made small and tried, and `docs/models.md` is written of it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from typing import Any

from figures.record import at_least, record
from figures.table import ROOT, Given, figure

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
