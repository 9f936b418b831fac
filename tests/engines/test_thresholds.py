"""From which estimate on neurons are read: quantiles of histograms, which are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from coreinfer_sim.engines.lean.thresholds import (
    N_BINS,
    Histograms,
    keep_histograms,
    kept_histograms,
    sound_histograms,
)

BIN = 2 ** (1 / 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where histograms are kept."""
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path))
    return tmp_path / "thresholds"


TEXTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]


def histograms(*of_layers):
    found = Histograms.empty(len(of_layers))
    for layer, values in enumerate(of_layers):
        for part in values.split(500):
            found.add(layer, part)
    return found


@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_thresholds_are_quantiles_to_within_a_bin(ratio):
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(20000, generator=g).abs() * 3, torch.rand(20000, generator=g) * 1e-4 + 1e-6]
    found = histograms(*layers).thresholds(ratio)
    assert found.dtype == np.float32
    for values, threshold in zip(layers, found, strict=True):
        exact = float(values.quantile(1 - ratio, interpolation="higher"))
        assert exact / BIN <= threshold <= exact * BIN
        assert abs(float((values >= threshold).float().mean()) - ratio) <= 0.02 * ratio + 0.001


def test_a_larger_share_has_a_lower_threshold():
    found = histograms(torch.randn(5000).abs())
    thresholds = [float(found.thresholds(ratio)[0]) for ratio in np.linspace(0.01, 1, 50)]
    assert all(a > b for a, b in zip(thresholds, thresholds[1:], strict=False))
    assert thresholds[-1] <= float(2**-10)


def test_zeros_are_read_by_no_ratio():
    """ReLU leaves most neurons at nothing: more than those that give something is never read."""
    values = torch.cat([torch.zeros(900), torch.linspace(0.5, 1.5, 100)])
    found = histograms(values)
    assert float((values >= float(found.thresholds(0.05)[0])).float().mean()) == pytest.approx(0.05, abs=0.01)
    for ratio in (0.1, 0.3, 0.99, 1.0):
        threshold = float(found.thresholds(ratio)[0])
        assert 0 < threshold <= 0.5 and int((values >= threshold).sum()) == 100


def test_what_fits_no_bin_is_counted_in_the_last_ones():
    found = histograms(torch.tensor([0.0, 1e-30, 1e30, float("inf")]))
    assert found.counts[0, 0] == 2 and found.counts[0, -1] == 2 and found.counts.sum() == 4


def test_values_are_left_as_they_were():
    values = torch.rand(10)
    before = values.clone()
    histograms(values)
    assert torch.equal(values, before)


def test_histograms_are_kept_and_read_again(folder):
    found = histograms(torch.rand(100), torch.rand(50))
    assert kept_histograms("abc", "Q8_0 high", TEXTS, 2) is None
    keep_histograms(found, "abc", "Q8_0 high", TEXTS)
    (path,) = folder.iterdir()
    assert " " not in path.name
    again = kept_histograms("abc", "Q8_0 high", TEXTS, 2)
    assert again is not None and (again.counts == found.counts).all()
    assert (again.thresholds(0.3) == found.thresholds(0.3)).all()
    for other in (
        ("abd", "Q8_0 high", TEXTS, 2),
        ("abc", "Q4_0 high", TEXTS, 2),
        ("abc", "Q8_0 high", TEXTS[:1], 2),
        ("abc", "Q8_0 high", TEXTS, 3),
    ):
        assert kept_histograms(*other) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"kind": "float32"}',
        b'{"counts": 3}',
        b'{"counts": [[1, 2], [3, 4]]}',
        b'{"counts": [[1, 2], [3]]}',
        json.dumps({"counts": [["x"] * N_BINS] * 2}).encode(),
        json.dumps({"counts": [[-1] + [1] * (N_BINS - 1)] * 2}).encode(),
        json.dumps({"counts": [[1] * N_BINS, [0] * N_BINS]}).encode(),
        json.dumps({"counts": [[10**30] * N_BINS] * 2}).encode(),
    ],
)
def test_damaged_files_are_passed_over(content, folder):
    found = histograms(torch.rand(100), torch.rand(50))
    keep_histograms(found, "abc", "float32", TEXTS)
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert kept_histograms("abc", "float32", TEXTS, 2) is None
    keep_histograms(found, "abc", "float32", TEXTS)
    assert kept_histograms("abc", "float32", TEXTS, 2) is not None


def test_no_place_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "file"))
    keep_histograms(histograms(torch.rand(10)), "abc", "float32", TEXTS)
    assert kept_histograms("abc", "float32", TEXTS, 1) is None


def test_counts_of_an_index_are_taken_if_they_fit_the_model():
    found = histograms(torch.rand(100), torch.rand(50))
    again = sound_histograms(found.counts.astype(np.uint16), 2)
    assert again is not None and (again.thresholds(0.3) == found.thresholds(0.3)).all()
    for counts, n_layers in ((found.counts, 3), (found.counts[:, 1:], 2), (-found.counts, 2), (0 * found.counts, 2)):
        assert sound_histograms(counts, n_layers) is None
