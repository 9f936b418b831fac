"""The same command gives the same text: fresh processes with fresh caches, in every engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_index import PROMPTS

MODES = ("similarity", "hybrid", "global", "dense")
_RUN = """
import json, sys
import coreinfer_sim
index, model, prompt, modes, settings = (json.loads(each) for each in sys.argv[1:])
with coreinfer_sim.load(index, model, **settings) as generator:
    runs = [generator.generate(prompt, max_new_tokens=24, mode=mode) for mode in modes if mode in generator.modes]
print(json.dumps([[run.engine, run.text, run.token_ids] for run in runs]))
"""


def run(cache: Path, *given: object) -> list[list[object]]:
    """Generate in a process of its own, whose caches are all empty."""
    fresh = {"HOME", "XDG_CACHE_HOME", "COREINFER_SIM_CACHE", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    environment = {**os.environ, **{name: str(cache / name.lower()) for name in fresh}}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _RUN, *(json.dumps(each) for each in given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "transformers"},
        *(
            pytest.param(each, marks=pytest.mark.slow)  # what fresh caches lack is compiled
            for each in (
                {"engine": "lean"},
                {"engine": "lean", "weights": "int8"},
                {"engine": "transformers", "dtype": "bfloat16"},
                {"engine": "compiled"},
                {"engine": "llamacpp"},
            )
        ),
    ],
    ids=lambda settings: " ".join(settings.values()),
)
def test_fresh_caches_give_the_same_text(settings, wide_index, wide_checkpoint, exported, tmp_path):
    if settings["engine"] == "llamacpp":
        pytest.importorskip("xllamacpp")
        settings = {**settings, "exported": str(exported), "context": 256}
    given = (wide_index.name, wide_checkpoint, f"{PROMPTS[0]} 1", MODES, settings)
    first, second = (run(tmp_path / name, *given) for name in ("one", "other"))
    assert first == second
    assert len(first) >= 3 and all(text for _, text, _ in first)
