"""MLPs as the compiled loops read them: dense, or cut down to held neurons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from coreinfer_sim.engines.cutting import merge_delta
from coreinfer_sim.engines.lean.formats import FORMATS
from coreinfer_sim.engines.lean.intrinsics import GELU, GELU_TANH, RELU, RELU2, bits, set_threads
from coreinfer_sim.engines.lean.matrix import Array, Matrix, float_type
from coreinfer_sim.engines.lean.mlp_loops import whole_loop
from coreinfer_sim.engines.lean.packing import gather_inputs
from coreinfer_sim.engines.lean.products import LOOP, N_WORDS
from coreinfer_sim.index.compensated import LayerCompensation
from coreinfer_sim.models.mlps import MLPLayer

_READ_BYTES = 1 << 20  # of neurons that are read from the disk at a time


@dataclass(frozen=True, eq=False)
class WholeMLP:
    """An MLP whose neurons are all read."""

    inputs: tuple[Matrix, ...]
    """Gate and up [n_ff, d_model], or up alone."""
    down: Matrix
    """[d_model, n_ff]."""

    @property
    def parts(self) -> tuple[Matrix, ...]:
        """The matrices in the order in which they are read."""
        return *self.inputs, self.down

    @property
    def n_ff(self) -> int:
        """Neurons."""
        return self.inputs[0].n_out

    @cached_property
    def words(self) -> Array:
        """What `mlp.whole_mlp` reads, int64 [3, N_WORDS]."""
        nothing = np.zeros(N_WORDS, np.int64)
        up = self.inputs[1].words if len(self.inputs) == 2 else nothing
        words = np.stack([self.inputs[0].words, up, self.down.words])
        words[0, LOOP] = whole_loop()
        return words

    @cached_property
    def n_bytes(self) -> int:
        """Bytes in memory, all of which a token reads."""
        return sum(part.n_bytes for part in self.parts)

    def outputs(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        """Return what the MLP gives for normalised inputs [n_rows, d_model]; ``kind`` is of the activation."""
        inner = of_gates(self.inputs[0].times(x), kind)
        if len(self.inputs) == 2:
            inner *= self.inputs[1].times(x)
        return self.down.times(inner)


def of_gates(gates: torch.Tensor, kind: int) -> torch.Tensor:
    """Return φ of gates; see `intrinsics.SILU` and the others."""
    if kind == RELU2:
        return F.relu(gates).square_()
    if kind in (GELU, GELU_TANH):
        return F.gelu(gates, approximate="tanh" if kind == GELU_TANH else "none")
    return F.relu(gates) if kind == RELU else F.silu(gates)


def held_mlp(dense: WholeMLP, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> WholeMLP:
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
    return WholeMLP(tuple(part.outputs(ids) for part in dense.inputs), _down(down, columns, compensation))


def read_mlp(layer: MLPLayer, ids: torch.Tensor, compensation: LayerCompensation | None = None) -> WholeMLP:
    """Read the neurons ``ids`` of a layer whose weights are on the disk."""
    store = layer.store
    assert store is not None
    n, d_model, n_inputs = len(ids), layer.d_model, 2 if layer.gated else 1
    inputs = torch.empty(n_inputs, n, d_model, dtype=store.dtype)
    columns = torch.empty(d_model, n, dtype=store.dtype)
    step = max(64, _READ_BYTES // (3 * d_model * store.dtype.itemsize))
    for begin in range(0, n, step):  # which lie neuron by neuron there; a whole layer is never held twice
        part = slice(begin, begin + step)
        neurons = store.read_neurons(ids[part])
        inputs[:, part] = neurons[:, :n_inputs].transpose(0, 1)
        columns[:, part] = neurons[:, n_inputs].T
    biases = [layer.projection(name).bias for name in layer.projections]
    halves = [ids, ids + layer.d_ff] if layer.fused else [ids]
    offsets = [None if bias is None else bias.detach()[rows] for bias in biases[:-1] for rows in halves]
    parts = tuple(Matrix.of(weight, bias) for weight, bias in zip(inputs, offsets, strict=True))
    return WholeMLP(parts, _down(Matrix.of(columns[:, :0], biases[-1]), columns, compensation))


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
