"""Errors are told apart by their class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coreinfer_sim.base.errors import OutOfMemoryError, as_out_of_memory


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_memory_that_runs_out_is_one_kind_of_error(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        allocate(10**15)
    assert isinstance(as_out_of_memory(error.value), OutOfMemoryError)
    for other in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (1 GiB)")):
        assert isinstance(as_out_of_memory(other), OutOfMemoryError)


@pytest.mark.parametrize("error", [RuntimeError("a memory format is unknown"), ValueError("DefaultCPUAllocator")])
def test_other_errors_are_left_alone(error):
    assert as_out_of_memory(error) is None
