"""The programs in PyTorch: transformers' own generate, the same with weights on disk, and our own runtime."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from coreinfer_sim.base.decode_settings import ModelConfig
from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.base.hub import NO_CODE
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.bench.programs import BenchJob, Prompt, Timing
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.opening import load, open_index
from coreinfer_sim.models.loading import DTYPES
from coreinfer_sim.models.mlps import dense_bytes, find_mlps, other_bytes


class _FirstTokenTimer:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self._n_puts = 0
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then a token a call."""
        self._n_puts += 1
        if self._n_puts == 2:
            self.first_token = time.perf_counter()

    def end(self) -> None:
        """Receive the end."""


class TransformersProgram:
    """The dense model through transformers' own ``generate``."""

    def __init__(self, job: BenchJob) -> None:
        """Keep the job."""
        self._job = job
        self._model: Any = None
        self._bytes = 0

    def start(self) -> dict[str, Any]:
        """Load the model."""
        loaded = self._job.subject.load(self._job.spec.dtype, self._job.device)
        self._model = loaded.model
        self._bytes = dense_bytes(loaded.layers) + other_bytes(loaded.model, loaded.layers)
        return {"dtype": loaded.dtype_name}

    def run(self, prompt: Prompt, n_new: int) -> Timing:
        """Generate exactly ``n_new`` tokens, greedily."""
        ids = torch.tensor([prompt.ids], device=self._model.device)
        clock = _FirstTokenTimer()
        begin = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=clock, pad_token_id=0, **_exactly(n_new)
        )
        end = time.perf_counter()
        _check_length(output.shape[1] - ids.shape[1], n_new)
        assert clock.first_token is not None
        first, decode = clock.first_token - begin, end - clock.first_token
        return Timing(0.0, 0.0, first, first, decode, n_new, (n_new - 1) / decode, self._bytes)

    def stop(self) -> None:
        """Let go of the model."""
        self._model = None
        gc.collect()


class OffloadProgram(TransformersProgram):
    """The dense model, with as many layers in memory as a limit allows and the others read from disk for each token."""

    def start(self) -> dict[str, Any]:
        """Load the model through accelerate."""
        from transformers import AutoModelForCausalLM

        spec, source = self._job.spec, str(self._job.file or self._job.subject.model)
        assert spec.ratio is not None and self._job.folder is not None
        if source.endswith(".gguf"):
            raise ConfigError(
                "accelerate cannot leave the layers of a GGUF file on disk, expected a checkpoint; name that."
            )
        dtype = DTYPES.get(spec.dtype, "auto")
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map="meta", **NO_CODE)
        n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
        layers = find_mlps(whole)
        self._bytes = dense_bytes(layers) + other_bytes(whole, layers)
        self._model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map="auto",
            max_memory={"cpu": int(spec.ratio * n_bytes)},
            offload_folder=str(self._job.folder),
            **NO_CODE,
        ).eval()
        places = list(self._model.hf_device_map.values())
        if set(places) == {"disk"}:
            raise ConfigError(f"not one part of the model fits into {spec.ratio:g} of its size; raise the share.")
        return {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "parts_on_disk": f"{places.count('disk')} of {len(places)}",
        }


class OwnProgram:
    """Our own runtime, in any mode."""

    def __init__(self, job: BenchJob) -> None:
        """Keep the job."""
        self._job = job
        self._generator: TextGenerator | None = None

    def start(self) -> dict[str, Any]:
        """Load index, model and engine."""
        spec, subject = self._job.spec, self._job.subject
        ratio = None if spec.mode is Mode.DENSE else spec.ratio
        settings = {"mode": spec.mode, "keep_ratio": ratio, "seed": self._job.seed, **spec.options}
        settings["prefix_bytes"] = 0  # every run reads its prompt, as those of the others do
        loading = ModelConfig(dtype=spec.dtype, device=self._job.device)
        model = subject.model if subject.shape is None else subject.load(spec.dtype, self._job.device)
        index = open_index(subject.index, subject.encoder) if spec.needs_index else None
        generator = load(index, model, loading=loading, **settings)
        if not isinstance(generator, TextGenerator):
            raise ConfigError(f"the contender {spec.text!r} decodes elsewhere, expected an engine of this process.")
        generator.take_over()  # nobody else knows the model
        self._generator = generator
        return {"dtype": generator.language_model.dtype_name, "weights": generator.decode.weights_type.value}

    def run(self, prompt: Prompt, n_new: int) -> Timing:
        """Generate exactly ``n_new`` tokens, greedily."""
        assert self._generator is not None
        found = self._generator.generate(prompt.text, max_new_tokens=n_new, ignore_eos=True)
        _check_length(found.n_new_tokens, n_new)
        if found.n_prompt_tokens != len(prompt.ids):
            raise GenerationError(
                f"the prompt became {found.n_prompt_tokens} tokens, expected {len(prompt.ids)}, as for the others."
            )
        selection = found.selection
        return Timing(
            lookup_seconds=found.lookup_seconds,
            swap_seconds=found.prepare_seconds,
            prefill_seconds=found.prefill_seconds - found.lookup_seconds,
            first_token_seconds=found.prefill_seconds,
            decode_seconds=found.decode_seconds,
            n_new=n_new,
            tokens_per_second=found.tokens_per_second or 0.0,
            bytes_per_token=found.total_bytes_per_token or 0,
            facts={
                "mode": selection.mode,
                "cluster": selection.cluster,
                "keep_ratio": None if found.keep_ratio is None else round(found.keep_ratio, 4),
                "engine": found.engine,
            },
        )

    def stop(self) -> None:
        """Let go of the model."""
        if self._generator is not None:
            self._generator.close()
        self._generator = None
        gc.collect()


def _exactly(n_new: int) -> dict[str, Any]:
    """Return the options of a greedy ``generate`` of so many tokens, whatever the checkpoint's own settings are."""
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_k": None, "top_p": None}
    # No end token rather than a least length, which costs a pass over all logits that no user pays.
    return {"max_new_tokens": n_new, "eos_token_id": None, **greedy}


def _check_length(found: int, n_new: int) -> None:
    if found != n_new:
        raise GenerationError(f"{found} new tokens came, expected {n_new}.")
