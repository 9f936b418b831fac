"""Gated MLPs as the compiled loops read them: dense, or cut down to held neurons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.engines.cutting import merge_delta
from coreinfer_sim.engines.lean.formats import FORMATS
from coreinfer_sim.engines.lean.intrinsics import RELU, bits, set_threads
from coreinfer_sim.engines.lean.matrix import Array, Matrix, float_type
from coreinfer_sim.engines.lean.packing import gather_inputs
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import MLPLayer

_READ_BYTES = 1 << 20  # of neurons that are read from the disk at a time


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """Gate and up [n_ff, d_model], and down [d_model, n_ff]."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def parts(self) -> tuple[Matrix, Matrix, Matrix]:
        """The three matrices in the order in which they are read."""
        return self.gate, self.up, self.down

    @cached_property
    def words(self) -> Array:
        """What `mlp.gated_mlp` reads, int64 [3, N_WORDS]."""
        return np.stack([part.words for part in self.parts])

    @cached_property
    def n_bytes(self) -> int:
        """Bytes in memory, all of which a token reads."""
        return sum(part.n_bytes for part in self.parts)

    def outputs(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        """Return what the MLP adds for normalised inputs [n_rows, d_model]; ``kind`` is of the activation."""
        return self.down.times(of_gates(self.gate.times(x), kind).mul_(self.up.times(x)))


def of_gates(gates: torch.Tensor, kind: int) -> torch.Tensor:
    """Return φ of gates: ReLU or SiLU."""
    return F.relu(gates) if kind == RELU else F.silu(gates)


def held_mlp(dense: GatedMLP, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> GatedMLP:
    """Cut a dense MLP down to the neurons ``ids`` [n_kept] and merge the compensation.

    Rows of gate and up stay as they are. The blocks of a packed down projection run across neurons, so that those of the held
    ones are rounded anew: to 8 bits, or to 6 where they have fewer, at which little is lost.
    """
    down = dense.down
    if down.packed:
        columns = down.widened()[ids].T.contiguous()
    else:
        columns = torch.empty(down.n_out, len(ids), dtype=float_type(down.kind))
        set_threads()
        gather_inputs(bits(down.weight), ids.numpy(), bits(columns))
    return GatedMLP(dense.gate.outputs(ids), dense.up.outputs(ids), _down(down, columns, compensation))


def read_mlp(layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> GatedMLP:
    """Read the neurons ``ids`` of a layer whose weights are on the disk."""
    store = layer.store
    assert store is not None
    n, d_model = len(ids), layer.d_model
    inputs = torch.empty(2, n, d_model, dtype=store.dtype)
    columns = torch.empty(d_model, n, dtype=store.dtype)
    step = max(64, _READ_BYTES // (3 * d_model * store.dtype.itemsize))
    for begin in range(0, n, step):  # which lie neuron by neuron there; a whole layer is never held twice
        part = slice(begin, begin + step)
        neurons = store.read_neurons(ids[part])
        inputs[:, part] = neurons[:, :2].transpose(0, 1)
        columns[:, part] = neurons[:, 2].T
    biases = [getattr(layer.owner, name).bias for name in layer.projections]
    gate, up = (
        Matrix.of(weight, None if bias is None else bias.detach()[ids])
        for weight, bias in zip(inputs, biases, strict=False)
    )
    return GatedMLP(gate, up, _down(Matrix.of(columns[:, :0], biases[2]), columns, compensation))


def _down(whole: Matrix, columns: torch.Tensor, compensation: LayerCompensation | None) -> Matrix:
    """Return the down projection of held neurons from its columns [d_model, n_kept], of which nobody else has a view."""
    bias = None if whole.bias is None else whole.bias[: whole.n_out]
    if compensation is not None:
        added = compensation.bias.float()
        bias = added if bias is None else bias + added
        merge_delta(columns, compensation)
    return Matrix.of(columns, bias, _anew(whole.kind))


def _anew(kind: str) -> str | None:
    """Return what columns of a matrix are rounded to; None: they stay floats."""
    if kind not in FORMATS:
        return None
    return "Q8_0" if FORMATS[kind].bits == 8 else "Q6_0"
