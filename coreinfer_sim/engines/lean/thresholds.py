"""From which estimate on a token reads a neuron: quantiles of what was measured on texts, a threshold a layer.

Histograms are sums, over tokens and neurons, of how often an estimated contribution lay in a bin; bins are a sixteenth of an
octave wide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from coreinfer_sim.base.files import cache_folder, write_json
from coreinfer_sim.engines.lean.matrix import Array

_PER_OCTAVE = 16
_LOWEST, _HIGHEST = -32, 8  # as powers of two
_VERSION = 2  # of what is counted
Texts = Sequence[torch.Tensor]
"""Token ids."""
N_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE


class Histograms:
    """Of estimated contributions |ẑ_n| · ‖w_out,n‖, one a layer."""

    def __init__(self, counts: Array) -> None:
        """Begin with counts, int64 [n_layers, N_BINS]."""
        self.counts = counts

    @classmethod
    def empty(cls, n_layers: int) -> Histograms:
        """Return histograms of nothing."""
        return cls(np.zeros((n_layers, N_BINS), np.int64))

    def add(self, layer: int, contributions: torch.Tensor) -> None:
        """Count estimates of a layer, of any shape."""
        octaves = contributions.clamp(2.0**_LOWEST, 2.0**_HIGHEST).log2_().sub_(_LOWEST)
        bins = octaves.mul_(_PER_OCTAVE).long().clamp_(0, N_BINS - 1)
        self.counts[layer] += torch.bincount(bins.flatten(), minlength=N_BINS).numpy()

    def thresholds(self, read_ratio: float) -> Array:
        """Return what a share ``read_ratio`` of each layer's estimates reach, float32 [n_layers]."""
        found = np.zeros(len(self.counts), np.float32)
        for layer, counts in enumerate(self.counts):
            above = np.cumsum(counts[::-1])[::-1]  # in a bin or a higher one
            wanted = read_ratio * above[0]
            place = int(np.searchsorted(-above, -wanted, side="right")) - 1  # the last bin with so many from it on
            within = (above[place] - wanted) / max(1, counts[place])
            found[layer] = 2.0 ** (_LOWEST + (place + within) / _PER_OCTAVE)
        return found


def name_of(kind: str) -> str:
    """Return what histograms of a layout are called in an index: other versions count otherwise."""
    return f"{kind} v{_VERSION}"


def sound_histograms(counts: Array, n_layers: int) -> Histograms | None:
    """Return histograms of counts that were read, or None if they are no counts of a model of so many layers."""
    if counts.shape == (n_layers, N_BINS) and counts.min() >= 0 and counts.sum(1).min() > 0:
        return Histograms(counts.astype(np.int64))
    return None


def kept_histograms(fingerprint: str, kind: str, texts: Texts, n_layers: int) -> Histograms | None:
    """Return what was measured before on some texts for a model's weights in a layout, from the user's cache folder."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        counts = np.array(json.loads(_file(fingerprint, kind, texts).read_text(encoding="utf-8"))["counts"], np.int64)
        return sound_histograms(counts, n_layers)
    return None


def keep_histograms(histograms: Histograms, fingerprint: str, kind: str, texts: Texts) -> None:
    """Keep what was measured, where there is a place for it."""
    place = _file(fingerprint, kind, texts)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"kind": kind, "counts": histograms.counts.tolist()})


def _file(fingerprint: str, kind: str, texts: Texts) -> Path:
    digest = hashlib.sha256(json.dumps([ids.tolist() for ids in texts]).encode()).hexdigest()
    name = f"{fingerprint[:24]}-{kind.replace(' ', '-')}-{digest[:8]}-{_VERSION}.json"
    return cache_folder("thresholds") / name
