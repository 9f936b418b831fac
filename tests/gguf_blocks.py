"""Random weights as GGUF files hold them."""

from __future__ import annotations

import gguf
import numpy as np

from coreinfer_sim.engines.lean.formats import FORMATS

GGUF_KINDS = [name for name in FORMATS if hasattr(gguf.GGMLQuantizationType, name)]
"""Types whose codes lie in memory as in a file; Q3_K lies as a Q6_K."""


def blocks_of(kind, n_out, n_in, seed=0):
    """Random blocks of ggml's type, [n_out, bytes of a row]; scales are small and not negative."""
    rng = np.random.default_rng(seed)
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (n_out, n_in // n_weights, n_bytes), dtype=np.uint8)
    places = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}.get(
        kind, [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]
    )
    for place in places:
        scales = (rng.random(raw.shape[:2]) / 10).astype(np.float16)
        raw[..., place : place + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(n_out, -1)
