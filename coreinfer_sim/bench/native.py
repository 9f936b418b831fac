"""llama.cpp as it is built for the processor at hand, through its own `llama-bench`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.base.files import cache_folder
from coreinfer_sim.base.processor import processor, processor_features
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.bench.programs import BenchJob, Prompt, Timing

SOURCE = "llama-cpp-python==0.3.36"
"""The package whose source holds llama.cpp."""
_ONE_AT_A_TIME = ("--batch-size", 1, "--ubatch-size", 1)
_TARGETS = ("llama-bench", "llama-quantize")
_CMAKE = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF")


class _CrashError(GenerationError):
    """A signal has ended llama-bench."""


class LlamaBenchProgram:
    """`llama-bench`, one process for each prompt length and run; it makes up its own tokens."""

    def __init__(self, job: BenchJob) -> None:
        """Keep the job, whose file is the GGUF file."""
        self._job = job
        self._peak = 0
        self._crash: str | None = None
        """What it said when it read a prompt in one batch, if that has killed it."""

    def start(self) -> dict[str, Any]:
        """Say what is run."""
        job = self._job
        assert job.file is not None
        return {"dtype": job.spec.dtype, "file_bytes": job.file.stat().st_size, "build": f"native, {job.llama_bench}"}

    def run(self, prompt: Prompt, n_new: int) -> Timing:
        """Read as many tokens as the prompt has, and decode ``n_new`` behind as many.

        A build may crash in products of several rows and decode well: version 0.3.36 does with quantised weights on processors
        with AMX. Then the prompt is read without that build's own layout of weights, and before decode it is read one token at
        a time; `Timing.facts` says so.

        Raises:
            GenerationError: llama-bench crashed in decode, too, or gave no figures.
        """
        assert self._job.bytes_per_token is not None
        n_prompt = len(prompt.ids)
        prefill, facts = self._prefill_seconds(n_prompt), {}
        decode = self._seconds("-p", 0, "-n", n_new, "-d", n_prompt, *(_ONE_AT_A_TIME if self._crash else ()))
        if self._crash:
            facts["crashed"] = (
                f"{self._crash.rstrip('.')}; it read the prompt with --repack 0, and one token at a time before decode."
            )
        return Timing(
            lookup_seconds=0.0,
            swap_seconds=0.0,
            prefill_seconds=prefill,
            first_token_seconds=prefill,  # the first token comes of the prompt's last position
            decode_seconds=decode * (n_new - 1) / n_new,
            n_new=n_new,
            tokens_per_second=n_new / decode,
            bytes_per_token=self._job.bytes_per_token,
            facts=facts,
        )

    def peak_bytes(self) -> int:
        """Return the most memory that one of the processes has held."""
        return self._peak

    def stop(self) -> None:
        """Nothing is kept between runs."""

    def _prefill_seconds(self, n_prompt: int) -> float:
        """Return how long a prompt takes."""
        options = ("-p", n_prompt, "-n", 0)
        if self._crash is None:
            try:
                return self._seconds(*options)
            except _CrashError as crash:
                self._crash = str(crash)
        return self._seconds(*options, "--repack", 0)

    def _seconds(self, *options: object) -> float:
        """Return how long one test takes, in seconds."""
        job = self._job
        words = [job.llama_bench, "-m", job.file, "-t", job.n_threads, "-r", 1, "-o", "json", *options]
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen([str(word) for word in words], stdout=said, stderr=errors)
            code, self._peak = _ended(process, self._peak)
            said.seek(0)
            errors.seek(0)
            answer, complaint = said.read(), errors.read().decode(errors="replace").strip()
        if code < 0:
            raise _CrashError(f"llama-bench crashed (signal {-code}) with {' '.join(map(str, options))}.")
        try:
            (test,) = json.loads(answer)
            return float(test["avg_ns"]) / 1e9
        except (ValueError, KeyError, TypeError) as error:
            last = complaint.splitlines()[-1:] or ["no figures"]
            raise GenerationError(f"llama-bench ended with code {code}, and said: {last[0]}.") from error


def _ended(process: subprocess.Popen[bytes], peak: int) -> tuple[int, int]:
    """Wait for a process; return its exit code, negative for a signal, and its peak memory or the one given, if that is more."""
    if not hasattr(os, "wait4"):
        return process.wait(), peak
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, max(peak, usage.ru_maxrss * unit)


def check_llama_bench(path: Path) -> Path:
    """Return the absolute path of a `llama-bench` that runs.

    Raises:
        ConfigError: it does not.
    """
    try:
        done = subprocess.run([path.absolute(), "--help"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be run ({error.strerror}), expected the program llama-bench.") from error
    if "--n-gen" not in done.stdout + done.stderr:
        raise ConfigError(f"{path} is not llama-bench: its help knows no --n-gen.")
    return path.absolute()


def quantiser_beside(llama_bench: Path | None) -> Path | None:
    """Return the `llama-quantize` that lies where `llama-bench` does, if there is one."""
    beside = llama_bench.with_name(llama_bench.name.replace("bench", "quantize")) if llama_bench is not None else None
    return beside if beside is not None and beside.is_file() and beside != llama_bench else None


def build_llama_bench(progress: Progress | None = None) -> Path:
    """Build `llama-bench` for this processor from llama.cpp's source, once, in the user's cache folder, and `llama-quantize`.

    Raises:
        ConfigError: a tool that is needed is missing, or the source cannot be had or built.
    """
    progress = progress or Progress()
    kind = re.sub(r"\W+", "-", f"{processor()} {' '.join(processor_features())}").strip("-").lower()
    target = cache_folder("llama.cpp") / f"{SOURCE.replace('==', '-')}-{kind}" / "llama-bench"
    if target.is_file() and quantiser_beside(target) is not None:
        return target
    missing = [tool for tool in ("cmake", "make", "c++") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"llama.cpp cannot be built without {' and '.join(missing)}; install what is missing, or name a llama-bench that is "
            "built."
        )
    progress.say(f"Building llama.cpp for this processor from {SOURCE}, once; it takes some minutes")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"],
            ["--no-binary", "llama-cpp-python", "--dest", folder, SOURCE],  # what builds it may come as a wheel
        )
        (packed,) = folder.glob("*.tar.gz")
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.glob("*/vendor/llama.cpp")
        _run(["cmake", "-S", source, "-B", folder / "build", *_CMAKE])
        _build(folder / "build", progress)
        target.parent.mkdir(exist_ok=True)
        for name in reversed(_TARGETS):  # what is looked for comes last
            (built,) = (folder / "build" / "bin").glob(f"{name}*")
            shutil.copy2(built, folder / "done")
            (folder / "done").replace(target.with_name(name))
    return target


def _build(folder: Path, progress: Progress) -> None:
    """Compile, and tell how far that is: each line of make begins with a share."""
    command = ["cmake", "--build", str(folder), "--target", *_TARGETS, "--parallel", str(os.cpu_count() or 1)]
    progress.start("Building llama.cpp", 100, "%")
    lines: list[str] = []
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[-200:], line]
            share = re.match(r"\[\s*(\d+)%\]", line)
            if share and int(share[1]) > done:
                progress.advance(int(share[1]) - done)
                done = int(share[1])
    progress.finish()
    _check(command, process.returncode, lines)


def _run(*words: list[Any]) -> None:
    command = [str(word) for part in words for word in part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _check(command, done.returncode, (done.stderr.strip() or done.stdout.strip()).splitlines())


def _check(command: list[str], code: int, said: list[str]) -> None:
    if code:
        said = said or ["nothing"]
        told = next((line for line in said if "error" in line.lower()), said[-1])
        raise ConfigError(f"llama.cpp cannot be built: {' '.join(command[:3])} … said {told.strip()!r}.")
