"""What a process holds: what is freed is kept within a block and given back after it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from coreinfer_sim.memory import freed_memory_kept

_MEASURED = """
import json, resource
import torch
from coreinfer_sim.memory import freed_memory_kept, resident_bytes

def faults(n=8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(1 << 24)  # 64 MiB, more than glibc keeps by itself
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / n

faults()
outside = faults()
before = resident_bytes()
with freed_memory_kept():
    faults()
    within, held = faults(), resident_bytes() - before
print(json.dumps({"outside": outside, "within": within, "held": held, "after": resident_bytes() - before}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_within_the_block_and_given_back_after_it() -> None:
    found = json.loads(
        subprocess.run([sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=True).stdout
    )
    assert found["within"] < 0.25 * found["outside"], found
    assert found["held"] > 60 << 20 and found["after"] < 8 << 20, found


def test_it_also_ends_where_the_block_fails() -> None:
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError
