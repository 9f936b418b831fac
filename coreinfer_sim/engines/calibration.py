"""What reading by token is calibrated on where nothing better is known: a short text about many things."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.progress import Progress
from coreinfer_sim.engines.face import Engine


def calibrate(
    engine: Engine, tokenizer: Any, progress: Progress | None = None, known: Mapping[str, np.ndarray] | None = None
) -> None:
    """Let an engine measure the passages of the text, unless it has done so before; see `Engine.calibrate`.

    Args:
        engine: to calibrate.
        tokenizer: of its model.
        progress: receives what is done.
        known: histograms of an index.
    """
    engine.calibrate(lambda: passages(tokenizer), progress, known)


def passages(tokenizer: Any) -> list[torch.Tensor]:
    """Return the token ids of the passages, [n_tokens] each."""
    text = files("coreinfer_sim.engines").joinpath("calibration.txt").read_text(encoding="utf-8")
    found = [tokenizer(passage.strip(), verbose=False)["input_ids"] for passage in text.split("\n\n\n")]
    return [torch.tensor(ids) for ids in found]
