"""Files of compensated sets: older ones, strange ones."""

from __future__ import annotations

import pytest
import torch
from compensation_cases import drawn
from safetensors.torch import save_file

from coreinfer_sim.base.errors import IndexFormatError
from coreinfer_sim.index.compensated import LayerCompensation, load_compensated, save_compensated


def test_sets_of_earlier_releases_are_read_unless_they_were_stored_in_factors(tmp_path):
    ids, bias, path = torch.arange(4, dtype=torch.int32), drawn(6), tmp_path / "set"
    nothing = {"0.left": torch.zeros(6, 0), "0.right": torch.zeros(0, 4)}
    for more, delta in (({"0.left": drawn(6, 4)}, drawn(6, 4)), (nothing, None)):
        save_file({"0.ids": ids, "0.bias": bias, **more}, path)
        _, repairs = load_compensated(path, 6, 2)
        assert torch.equal(repairs[0].bias, bias)
        assert repairs[0].delta is None if delta is None else torch.equal(repairs[0].delta, delta)
    bypass = {"0.bypass_in": drawn(2, 6), "0.bypass_out": drawn(6, 2)}
    factors = {"0.left": drawn(6, 2), "0.right": drawn(2, 4)}
    for more, form in (({"0.left": drawn(6, 4), **bypass}, "with a bypass"), (factors, "in two factors")):
        save_file({"0.ids": ids, "0.bias": bias, **more}, path)
        with pytest.raises(
            IndexFormatError, match=f"stored {form}, which this release does not read; build the index anew"
        ):
            load_compensated(path, 6, 2)


def test_strange_shapes_are_refused(tmp_path):
    kept = {0: torch.arange(4)}
    save_compensated(tmp_path / "good", kept, {0: LayerCompensation(drawn(6), drawn(6, 4))})
    ids, repairs = load_compensated(tmp_path / "good", 6, 2)
    assert set(ids) == {0} and torch.allclose(repairs[0].delta.float(), drawn(6, 4), atol=0.02)
    save_compensated(tmp_path / "bad", kept, {0: LayerCompensation(drawn(6), drawn(6, 3))})
    with pytest.raises(IndexFormatError, match="do not fit 4 neurons"):
        load_compensated(tmp_path / "bad", 6, 2)
    (tmp_path / "none").write_bytes(b"no safetensors")
    with pytest.raises(IndexFormatError, match="cannot be read"):
        load_compensated(tmp_path / "none", 6, 2)
