"""llama.cpp on a GGUF file of the same weights."""

from __future__ import annotations

import gc
import time
from importlib.metadata import version
from typing import Any

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.bench.programs import BenchJob, Prompt, Timing
from coreinfer_sim.engines.llamacpp.server import LlamaServer


class LlamaCppProgram:
    """llama.cpp through xllamacpp; its own clocks tell prefill from decode."""

    def __init__(self, job: BenchJob) -> None:
        """Keep the job, whose file is the GGUF file."""
        self._job = job
        self._server: LlamaServer | None = None

    def start(self) -> dict[str, Any]:
        """Open the file."""
        job = self._job
        assert job.file is not None
        self._server = LlamaServer(job.file, str(job.folder), job.context, job.n_threads)
        build = f"ready-made package, xllamacpp {version('xllamacpp')}"
        return {"dtype": job.spec.dtype, "file_bytes": job.file.stat().st_size, "build": build}

    def run(self, prompt: Prompt, n_new: int) -> Timing:
        """Generate exactly ``n_new`` tokens, greedily, without anything kept from earlier prompts.

        Raises:
            GenerationError: llama.cpp gave another number of tokens.
        """
        assert self._server is not None and self._job.bytes_per_token is not None
        request = {"prompt": prompt.ids, "n_predict": n_new, "temperature": 0.0, "top_k": 1, "ignore_eos": True}
        begin = time.perf_counter()
        answer = self._server.post("/completion", {**request, "cache_prompt": False, "return_tokens": True})
        wall = time.perf_counter() - begin
        if answer["tokens_predicted"] != n_new or answer["tokens_evaluated"] != len(prompt.ids):
            raise GenerationError(
                f"llama.cpp read {answer['tokens_evaluated']} tokens and gave {answer['tokens_predicted']}, expected "
                f"{len(prompt.ids)} and {n_new}."
            )
        timings = answer["timings"]
        decode = timings["predicted_ms"] / 1000  # its clock starts at the first new token
        return Timing(
            lookup_seconds=0.0,
            swap_seconds=0.0,
            prefill_seconds=timings["prompt_ms"] / 1000,
            first_token_seconds=wall - decode,
            decode_seconds=decode,
            n_new=n_new,
            tokens_per_second=(n_new - 1) / decode,
            bytes_per_token=self._job.bytes_per_token,
        )

    def stop(self) -> None:
        """Close the file."""
        self._server = None
        gc.collect()
