"""Files that contenders need before they start: GGUF files and checkpoints of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig
from coreinfer_sim.base.errors import ConfigError, CoreInferSimError
from coreinfer_sim.bench.programs import Subject
from coreinfer_sim.bench.specs import DENSE as DENSE_TRANSFORMERS
from coreinfer_sim.bench.specs import LLAMACPP, OFFLOAD, OWN_FILE, Spec
from coreinfer_sim.bench.worker import one_sentence
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.router import DENSE
from coreinfer_sim.export.gguf import QUANTISED, check_exportable, export_gguf, facts_of, quantise, source_of
from coreinfer_sim.export.weights import Source, compact_weights
from coreinfer_sim.generation.opening import laid_out_model
from coreinfer_sim.models.loading import LanguageModel


@dataclass(frozen=True)
class ProgramFile:
    """A file for a contender, or why there is none."""

    path: Path | None = None
    bytes_per_token: int | None = None
    error: str | None = None


def write_files(
    subject: Subject, specs: Sequence[Spec], folder: Path, quantiser: Path | None = None
) -> dict[str, ProgramFile]:
    """Write what llama.cpp and offload need, each file once, and lay out our own weights; files of an earlier run stay.

    Args:
        subject: the model.
        specs: the contenders.
        folder: where to; files in it must be of the same model.
        quantiser: llama.cpp's own, which chooses types as its users have them: a Q4_0 file has its output head in Q6_K. None: all
            matrices get one type, by the package gguf.

    Returns:
        By the contender's text.
    """
    if subject.model is not None:
        for spec in specs:
            if spec.kind not in (LLAMACPP, OFFLOAD, DENSE_TRANSFORMERS):
                with suppress(CoreInferSimError):  # the contender itself says so
                    given = {name: spec.options[name] for name in ("engine", "weights") if name in spec.options}
                    laid_out_model(subject.model, ModelConfig(dtype=spec.dtype), DecodeConfig(**given), spec.by_token)
    wanted = [s for s in specs if s.kind == LLAMACPP or (s.kind == OFFLOAD and subject.shape is not None)]
    if not wanted:
        return {}
    own = [spec for spec in wanted if spec.dtype == OWN_FILE]
    if own and not str(subject.model).lower().endswith(".gguf"):
        raise ConfigError(
            f"the contender {own[0].text!r} runs the GGUF file that the model is, but it is {subject.title}."
        )
    found = {spec.text: ProgramFile(Path(str(subject.model)), gguf_bytes(Path(str(subject.model)))) for spec in own}
    wanted = [spec for spec in wanted if spec not in own]
    if not wanted:
        return found
    language_model = subject.load("stored", "cpu")
    for spec in wanted:
        try:
            found[spec.text] = (
                _gguf(language_model, spec, folder, quantiser)
                if spec.kind == LLAMACPP
                else _checkpoint(language_model, folder)
            )
        except Exception as error:  # the other contenders go on
            found[spec.text] = ProgramFile(error=one_sentence(error))
    return found


def _gguf(language_model: LanguageModel, spec: Spec, folder: Path, quantiser: Path | None) -> ProgramFile:
    if quantiser is None or spec.dtype not in QUANTISED:
        path = _exported(language_model, spec.dtype, folder)
        return ProgramFile(path, gguf_bytes(path))
    whole = _exported(language_model, "bf16", folder)
    path = folder / f"quantised-{spec.dtype}.gguf"
    if not path.exists() or source_of(path) != source_of(whole):
        part = path.with_suffix(".part")
        quantise(quantiser, whole, part, spec.dtype)
        part.replace(path)
    return ProgramFile(path, gguf_bytes(path))


def _exported(language_model: LanguageModel, kind: str, folder: Path) -> Path:
    """Return the file of the dense model in one type."""
    path = folder / f"dense-{kind}.gguf"
    source = Source(language_model.name, "none", "none", DENSE, 1.0, False, kind)
    if not path.exists() or source_of(path) != facts_of(source):  # another model's
        check_exportable(language_model, kind)
        weights = compact_weights(language_model, NeuronSelection(DENSE), one_width=False)
        part = path.with_suffix(".part")
        export_gguf(language_model, weights, source, part, kind)
        part.replace(path)
    return path


def _checkpoint(language_model: LanguageModel, folder: Path) -> ProgramFile:
    path = folder / "checkpoint"
    if not path.exists():
        language_model.model.save_pretrained(path)
    return ProgramFile(path)


def gguf_bytes(path: Path) -> int:
    """Return the bytes of weights that one token reads in a GGUF file: all but the embeddings, unless they are the head."""
    import gguf

    sizes = {str(tensor.name): int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())
