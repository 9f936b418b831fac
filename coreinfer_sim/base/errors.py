"""The errors that a user can meet.

Every message is one sentence or two that say what was found, what was expected and what to do next. Callers tell errors
apart by their class, never by their words.
"""

from __future__ import annotations

import errno
import sys

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors where there is no room for a file."""


class CoreInferSimError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(CoreInferSimError):
    """A setting is out of range, or two settings contradict each other."""


class UnknownModeError(ConfigError):
    """A way to choose neurons is unknown, or not to be had from this engine."""


class UnknownEngineError(ConfigError):
    """There is no engine of that name."""


class CorpusError(CoreInferSimError):
    """A corpus cannot be opened, lacks a column, or holds nothing to use."""


class ModelError(CoreInferSimError):
    """A language model or a sentence encoder cannot be loaded or does not fit its use."""


class MissingModelError(ModelError):
    """The model that an index names is not to be had from where it was; another place can be given."""


class MissingEncoderError(ModelError):
    """The sentence encoder that an index names is not where it was."""


class UnsupportedModelError(ModelError):
    """The model's family has no adapter."""


class ClusteringError(CoreInferSimError):
    """The embeddings cannot be cut into the clusters that were requested."""


class IndexFormatError(CoreInferSimError):
    """A folder is no index, is damaged, or has a format version that this release does not read."""


class MissingMapError(IndexFormatError):
    """An index has no map of its prompts, as those of earlier releases have none."""


class MissingSumsError(IndexFormatError):
    """An index has no exact sums, as those of earlier releases have none, so that nothing can be added to it."""


class IndexMismatchError(CoreInferSimError):
    """An index and a model (or encoder) do not belong together."""


class BuildError(CoreInferSimError):
    """A build cannot start or go on."""


class GenerationError(CoreInferSimError):
    """A generate call requests something that sparse decode cannot give."""


class SamplingError(GenerationError):
    """Sampling settings contradict each other."""


class PromptError(GenerationError):
    """A prompt cannot be used: it is empty, or one of the kinds below."""


class ContextLengthError(PromptError):
    """A prompt and its new tokens do not fit into the model's context."""


class ChatTemplateError(PromptError):
    """The model has no chat template, or its template refuses the conversation."""


class RequestRefusedError(GenerationError):
    """Another program that generates refused a request."""


class GenerationCancelledError(GenerationError):
    """A generation was broken off, as its caller asked for."""


class HubError(CoreInferSimError):
    """A hub does not answer, or refuses what was asked of it."""


class ExportError(CoreInferSimError):
    """A set of neurons cannot be written in the format that was requested."""


class BenchmarkError(CoreInferSimError):
    """No contender of a benchmark could be measured."""


class StoreError(CoreInferSimError):
    """A neuron-major store cannot be made, or is damaged."""


class UnreachableError(CoreInferSimError):
    """A store, or what it is to hold, cannot be reached at its address."""


class BudgetError(CoreInferSimError):
    """A memory budget is too small for what was requested."""


class OutOfMemoryError(CoreInferSimError):
    """Memory ran out, of the machine or of its accelerator."""


_ALLOCATORS = ("DefaultCPUAllocator", "MPS backend out of memory")


def as_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """Return the error of another library as ours if memory ran out; None for every other error.

    Python and numpy raise MemoryError, torch on CUDA its own class. On CPUs and on Apple's GPUs torch raises a plain
    RuntimeError, which only the words of its allocators tell from others.
    """
    text, torch = " ".join(str(error).split()), sys.modules.get("torch")
    by_class = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    by_words = type(error) is RuntimeError and any(words in text for words in _ALLOCATORS)
    return OutOfMemoryError(f"out of memory ({text[:160]})") if by_class or by_words else None
