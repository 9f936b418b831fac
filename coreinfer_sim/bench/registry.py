"""Which program a contender is; each is imported only when it is made, as llama.cpp's process needs no torch."""

from __future__ import annotations

from coreinfer_sim.bench.programs import BenchJob, Program
from coreinfer_sim.bench.specs import DENSE, LLAMACPP, OFFLOAD


def make_program(job: BenchJob) -> Program:
    """Return the program of a job, not started yet."""
    if job.spec.kind == LLAMACPP and job.llama_bench is not None:
        from coreinfer_sim.bench.native import LlamaBenchProgram

        return LlamaBenchProgram(job)
    if job.spec.kind == LLAMACPP:
        from coreinfer_sim.bench.llamacpp import LlamaCppProgram

        return LlamaCppProgram(job)
    from coreinfer_sim.bench import torch_programs

    kinds = {DENSE: torch_programs.TransformersProgram, OFFLOAD: torch_programs.OffloadProgram}
    return kinds.get(job.spec.kind, torch_programs.OwnProgram)(job)
