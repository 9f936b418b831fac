"""Whether an index belongs to a model."""

from __future__ import annotations

from collections.abc import Sequence

from coreinfer_sim.base.errors import IndexMismatchError
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.fingerprint import SKETCH_SIZE, n_different_weights
from coreinfer_sim.models.mlps import MLPLayer

_REMEDY = "use that model, or build an index for this one: coreinfer-sim build-index"


def check_model(index: SemanticIndex, layers: Sequence[MLPLayer], tokenizer_sha256: str | None = None) -> None:
    """Raise IndexMismatchError unless an index was built from these MLPs (and this tokenizer).

    Args:
        index: the index.
        layers: the loaded model's MLPs.
        tokenizer_sha256: of the loaded tokenizer's vocabulary; None is not compared.
    """
    model = index.manifest.model
    found = (layers[0].family, len(layers), layers[0].d_model, layers[0].d_ff)
    expected = (model.family, model.n_layers, model.d_model, model.d_ff)
    if found[1:] != expected[1:]:  # families have had other names, and GGUF files call some models llama that are not
        raise IndexMismatchError(
            f"the model is {_shape_text(*found)}, but {index.name} was built from {model.name}, {_shape_text(*expected)}; "
            f"{_REMEDY}"
        )
    n_different = n_different_weights(model.weight_sketch, layers)
    if n_different:
        raise IndexMismatchError(
            f"{n_different} of {len(layers) * SKETCH_SIZE} sampled weights of the model differ from those that {index.name} "
            f"({model.name}) was built from, expected the same weights; {_REMEDY}"
        )
    if tokenizer_sha256 is not None and tokenizer_sha256 != model.tokenizer_sha256:
        raise IndexMismatchError(
            f"the tokenizer's vocabulary ({tokenizer_sha256[:12]}…) is not the one {index.name} was built with "
            f"({model.tokenizer_sha256[:12]}…); use the tokenizer of {model.name}."
        )


def _shape_text(family: str, n_layers: int, d_model: int, d_ff: int) -> str:
    return f"{family} with {n_layers} layers, d_model {d_model}, d_ff {d_ff}"
