"""Which processor this is, as figures and kernels name it."""

from __future__ import annotations

import platform
from pathlib import Path

_FEATURES = (
    *(
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """Return the vector and matrix instructions that the processor has, of those that decode could use; as Linux names them."""
    known = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return [name for name in _FEATURES if name in known]


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")
