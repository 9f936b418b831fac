"""What a model will take in memory of which tokens read neurons from the disk, known before anything is loaded."""

from __future__ import annotations

import torch
from torch import nn

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import Weights
from coreinfer_sim.engines.lean.architectures import architecture_of
from coreinfer_sim.engines.lean.blocks import HEAD, TOKEN_KINDS, rounded_kind
from coreinfer_sim.engines.lean.disk_records import slot_bytes, staged_records
from coreinfer_sim.engines.lean.formats import BLOCK, FORMATS, HIGH, TILE
from coreinfer_sim.engines.lean.head import KIND
from coreinfer_sim.engines.lean.packing import n_tiles
from coreinfer_sim.engines.lean.planes import ESTIMATE, LINE
from coreinfer_sim.engines.lean.record_rows import n_outputs
from coreinfer_sim.engines.sizes import DiskParts
from coreinfer_sim.models.budgeted import model_shape
from coreinfer_sim.models.weightless import Weightless

_PASSING = 4  # copies of a layer's or the head's weights that laying them out takes, in the worst case


def disk_parts(empty: Weightless, weights: Weights, made: bool) -> DiskParts:
    """Add up the parts of a model.

    Args:
        empty: a checkpoint folder's, without weights.
        weights: their type.
        made: whether it was laid out before.

    Raises:
        ConfigError: the weights are those of a GGUF file.
    """
    if empty.of_gguf:
        raise ConfigError(
            f"{empty.name} is a GGUF file, but under a memory budget tokens read neurons of checkpoint folders alone; give one, "
            "or leave out the read ratio or the budget."
        )
    model, layers = empty.model, empty.layers
    d_model, d_ff = layers[0].d_model, layers[0].d_ff
    floating = torch.bfloat16 if weights is Weights.BF16 else model.dtype
    of_mlps = {id(layer.projection(name)) for layer in layers for name in layer.projections}
    found = architecture_of(model.config)
    copied = not isinstance(found, str) and found.plain_logits
    # 1) outside the MLPs
    resident, widest = 0, 0
    matrices = {id(model.get_input_embeddings().weight)}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        matrices.add(id(module.weight))
        if id(module) in of_mlps:
            continue
        kind, (n_out, n_in) = rounded_kind(name, weights), module.weight.shape
        if name == HEAD and copied and kind is None and module.bias is None:  # its copy, and two bounds of each row
            resident += matrix_bytes(KIND, n_out, n_in) + 8 * n_out
            widest = n_out * n_in * floating.itemsize
        else:
            resident += n_out * n_in * floating.itemsize if kind is None else matrix_bytes(kind, n_out, n_in)
    resident += sum(4 * p.numel() for p in model.parameters() if id(p) not in matrices)  # norms and biases, widened
    # 2) the MLPs
    kind = TOKEN_KINDS.get(weights)
    estimate = ESTIMATE if kind is None else HIGH[kind]
    size = record_bytes(d_model, floating, kind)
    return DiskParts(
        shape=model_shape(model, layers),
        resident=resident,
        estimates=len(layers) * (2 * matrix_bytes(estimate, d_ff, d_model) + 4 * d_ff),
        layer=d_ff * size,
        records=len(layers) * d_ff * slot_bytes(size),
        staged=staged_records(d_ff) * slot_bytes(size),
        making=0 if made else max(_PASSING * 3 * d_ff * d_model * floating.itemsize, 2 * widest),
    )


def matrix_bytes(kind: str, n_out: int, n_in: int) -> int:
    """Return the bytes of a matrix in one of the `formats`."""
    format_ = FORMATS[kind]
    filled = -(-n_in // format_.filled) * format_.filled
    return n_tiles(n_out) * (filled // BLOCK * format_.code_bytes + filled // format_.span * format_.scale_bytes)


def record_bytes(d_model: int, floating: torch.dtype, kind: str | None) -> int:
    """Return the bytes of a neuron's record: of floats, or of codes that are rounded to Q8_0 or Q4_1."""
    if kind is None:
        n_bytes = 3 * d_model * floating.itemsize
    else:
        format_, high, n = FORMATS[kind], FORMATS[HIGH[kind]], n_outputs(kind, d_model)
        low = -(-d_model // high.filled) * high.filled * high.low_bits // 8
        n_bytes = 2 * low + n * format_.bits // 8 + n // BLOCK * format_.scale_bytes // TILE
    return -(-n_bytes // LINE) * LINE
