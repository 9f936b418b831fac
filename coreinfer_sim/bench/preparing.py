"""What contenders need before they start: prompts, GGUF files and checkpoints of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from coreinfer_sim.base.errors import ContextLengthError, ModelError
from coreinfer_sim.bench.contenders import Prompt, Subject
from coreinfer_sim.bench.prompts import cut_prompts, random_prompts
from coreinfer_sim.bench.specs import LLAMACPP, OFFLOAD, Spec
from coreinfer_sim.bench.worker import one_sentence
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.llamacpp.router import DENSE
from coreinfer_sim.export.compact import Source, compact_weights
from coreinfer_sim.export.gguf import check_exportable, export_gguf, facts_of, source_of
from coreinfer_sim.models.loading import LanguageModel, load_tokenizer


@dataclass(frozen=True)
class Written:
    """A file for a contender, or why there is none."""

    path: Path | None = None
    bytes_per_token: int | None = None
    error: str | None = None


def make_prompts(
    subject: Subject, text: str | None, n_tokens: int, n_new: int, n_prompts: int, seed: int
) -> list[Prompt]:
    """Return prompts of ``n_tokens`` tokens: random ones for a shape, else cut from ``text``.

    Raises:
        ContextLengthError: prompt and new tokens do not fit into the model's context.
        PromptError: the text is of no use.
    """
    config = subject.shape.config() if subject.shape else _config(subject)
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and n_tokens + n_new > limit:
        raise ContextLengthError(
            f"{n_tokens} prompt tokens and {n_new} new ones were asked for, but the model's context is {limit}; ask for fewer."
        )
    if subject.shape is not None:
        return random_prompts(n_tokens, n_prompts, seed)
    assert subject.model is not None
    return cut_prompts(load_tokenizer(subject.model), text, n_tokens, n_prompts)


def _config(subject: Subject) -> Any:
    """Return a checkpoint's configuration, or None for a GGUF file, whose own the contenders read."""
    model = str(subject.model)
    if model.endswith(".gguf"):
        return None
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the model {model!r} cannot be loaded ({reason}); expected a hub id, a checkpoint folder or a GGUF file."
        ) from error


def write_files(subject: Subject, specs: Sequence[Spec], folder: Path) -> dict[str, Written]:
    """Write what llama.cpp and offload need, each file once; files of an earlier run stay.

    Args:
        subject: the model.
        specs: the contenders.
        folder: where to; files in it must be of the same model.

    Returns:
        By the contender's text.
    """
    wanted = [s for s in specs if s.kind == LLAMACPP or (s.kind == OFFLOAD and subject.shape is not None)]
    if not wanted:
        return {}
    language_model = subject.load("stored", "cpu")
    found: dict[str, Written] = {}
    for spec in wanted:
        try:
            found[spec.text] = (
                _gguf(language_model, spec, folder) if spec.kind == LLAMACPP else _checkpoint(language_model, folder)
            )
        except Exception as error:  # the other contenders go on
            found[spec.text] = Written(error=one_sentence(error))
    return found


def _gguf(language_model: LanguageModel, spec: Spec, folder: Path) -> Written:
    path = folder / f"dense-{spec.dtype}.gguf"
    source = Source(language_model.name, "none", "none", DENSE, 1.0, False, spec.dtype)
    if not path.exists() or source_of(path) != facts_of(source):  # another model's
        check_exportable(language_model, spec.dtype)
        weights = compact_weights(language_model, NeuronSelection(DENSE), one_width=False)
        part = path.with_suffix(".part")
        export_gguf(language_model, weights, source, part, spec.dtype)
        part.rename(path)
    return Written(path, gguf_bytes(path))


def _checkpoint(language_model: LanguageModel, folder: Path) -> Written:
    path = folder / "checkpoint"
    if not path.exists():
        language_model.model.save_pretrained(path)
    return Written(path)


def gguf_bytes(path: Path) -> int:
    """Return the bytes of weights that one token reads in a GGUF file: all but the embeddings, unless they are the head."""
    import gguf

    sizes = {str(tensor.name): int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())
