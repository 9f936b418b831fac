"""The errors that a user can meet.

Every message is one sentence or two that say what was found, what was expected and what to do next.
"""

from __future__ import annotations


class CoreInferSimError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(CoreInferSimError):
    """A setting is out of range, or two settings contradict each other."""


class CorpusError(CoreInferSimError):
    """A corpus cannot be opened, lacks a column, or holds nothing to use."""


class ModelError(CoreInferSimError):
    """A language model or a sentence encoder cannot be loaded or does not fit its use."""


class UnsupportedModelError(ModelError):
    """The model's family has no adapter."""


class ClusteringError(CoreInferSimError):
    """The embeddings cannot be cut into the clusters that were asked for."""


class IndexFormatError(CoreInferSimError):
    """A folder is no index, is damaged, or has a format version that this release does not read."""


class IndexMismatchError(CoreInferSimError):
    """An index and a model (or encoder) do not belong together."""


class BuildError(CoreInferSimError):
    """A build cannot start or go on."""


class GenerationError(CoreInferSimError):
    """A generate call asks for something that sparse decode cannot give."""


class PromptError(GenerationError):
    """A prompt is empty or does not fit into the model's context."""


class ExportError(CoreInferSimError):
    """A set of neurons cannot be written in the format that was asked for."""


class BenchmarkError(CoreInferSimError):
    """No contender of a benchmark could be measured."""


class StoreError(CoreInferSimError):
    """A neuron-major store cannot be made, or is damaged."""


class BudgetError(CoreInferSimError):
    """A memory budget is too small for what was asked."""
