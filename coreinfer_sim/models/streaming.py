"""Dense layers whose weights stay on disk: read block by block while the layer computes, in one pass over its store.

The owner's own forward code runs unchanged. The first input projection it calls reads the layer's neurons once, computes what
all input projections give, and leaves the output weights in memory; the others hand out what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from coreinfer_sim.base.errors import GenerationError
from coreinfer_sim.models.checkpoint import Checkpoint
from coreinfer_sim.models.mending import check_rows
from coreinfer_sim.models.store import LayerStore

SCRATCH = 13 << 20
"""Bytes of the buffers that all layers share, the output weights of one layer left out."""
BLOCK_BYTES = 4 << 20
"""Weights that are read at a time."""
_WIDE = 1 << 20  # weights that are widened at a time


class Scratch:
    """Buffers that all layers of a model share.

    Two blocks as stored, of which one is read while the other is used, and the output weights of the layer at work.
    """

    def __init__(self, store: LayerStore, compute: torch.dtype) -> None:
        """Make buffers for blocks of ``store``'s shape; products are computed in the dtype ``compute``."""
        self.widens = compute is not store.dtype
        self.block_bytes = BLOCK_BYTES
        (_, n), *_ = store.ranges(BLOCK_BYTES)
        shape = n, store.n_parts, store.d_model
        self._raw = [torch.empty(shape, dtype=store.dtype) for _ in range(2)]
        largest = max(n * store.d_model, _WIDE, store.d_ff)
        self._wide = torch.empty(largest, dtype=compute) if self.widens else None
        self.output = torch.empty(store.d_ff, store.d_model, dtype=store.dtype)
        """Weights of the output projection, neuron by neuron."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layers")

    def blocks(self, store: LayerStore) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Draw (begin, end, weights [end − begin, n_parts, d_model]) over all neurons; the weights last one turn."""
        ranges = store.ranges(self.block_bytes)

        def read(number: int) -> torch.Tensor:
            begin, end = ranges[number]
            return store.read_range(begin, end, self._raw[number % 2][: end - begin])

        coming = self._reader.submit(read, 0)
        for number, (begin, end) in enumerate(ranges):
            block = coming.result()
            if number + 1 < len(ranges):
                coming = self._reader.submit(read, number + 1)
            yield begin, end, block

    def widened(self, weight: torch.Tensor) -> torch.Tensor:
        """Return some weights [n_out, n_in] in the dtype that computes, in the order in which they lie; until the next call."""
        assert self._wide is not None
        if weight.stride(0) < weight.stride(1):
            return self.widened(weight.T).T
        return self._wide[: weight.numel()].view(weight.shape).copy_(weight)


class StreamedMLP:
    """One layer's dense MLP, whose products are computed from its store."""

    def __init__(self, store: LayerStore, scratch: Scratch) -> None:
        """Read through the buffers ``scratch``; ``bind`` adds the projections."""
        self.store = store
        self._scratch = scratch
        self._inputs: list[StreamedLinear] = []
        self._x: torch.Tensor | None = None
        self._pre: list[torch.Tensor] = []

    def bind(self, inputs: list[StreamedLinear]) -> None:
        """Say which projections go from d_model to d_ff."""
        self._inputs = inputs

    def pre_activation(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return what input projection ``place`` gives for ``x`` [..., d_model]."""
        if x is not self._x:
            self._run(x)
        pre, self._pre[place] = self._pre[place], self._pre[place].new_empty(0)
        return pre

    @torch.no_grad()
    def output(self, z: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return what the output projection gives for ``z`` [..., d_ff], with the weights that the inputs' pass has left.

        Each sum is over all neurons at once, as in a model that is held in memory: bfloat16 shows another order of adding.
        """
        if self._x is None:
            raise GenerationError(
                "an MLP on disk was asked for its output before its input, expected the model's own forward."
            )
        self._x, self._pre = None, []
        rows, weight = z.reshape(-1, z.shape[-1]), self._scratch.output
        out = rows.new_empty(len(rows), self.store.d_model)
        step = max(1, _WIDE // self.store.d_ff)
        for begin in range(0, self.store.d_model, step):
            end = min(begin + step, self.store.d_model)
            out[:, begin:end] = self._product(rows, weight[:, begin:end].T, None if bias is None else bias[begin:end])
        return out.reshape(*z.shape[:-1], -1)

    @torch.no_grad()
    def _run(self, x: torch.Tensor) -> None:
        store, scratch = self.store, self._scratch
        rows = x.reshape(-1, x.shape[-1])
        pre = [rows.new_empty(len(rows), projection.weight.shape[0]) for projection in self._inputs]
        for begin, end, block in scratch.blocks(store):
            for part in range(store.n_parts - 1):
                place = min(part, len(pre) - 1)
                at = begin + (part - place) * store.d_ff  # the second half, if gate and up are fused
                bias = self._inputs[place].bias
                of = slice(at, at + end - begin)
                pre[place][:, of] = self._product(rows, block[:, part], None if bias is None else bias[of])
            scratch.output[begin:end] = block[:, -1]
        self._x = x
        self._pre = [p.reshape(*x.shape[:-1], -1) for p in pre]

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply ``x`` [n, n_in] with ``weight`` [n_out, n_in] as `products` does, rounding once."""
        if not self._scratch.widens:
            return F.linear(x, weight, bias)
        y = torch.mm(x.float(), self._scratch.widened(weight).T)
        if bias is not None:
            y += bias
        return y.to(x.dtype)


class StreamedLinear(nn.Module):
    """One projection of a layer on disk: its weight has a shape and a dtype, but no values in memory."""

    def __init__(self, mlp: StreamedMLP, place: int | None, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        """Stand for a linear map.

        Args:
            mlp: the layer.
            place: among the input projections; None: the output projection.
            shape: (out features, in features).
            bias: stays in memory, [out features].
        """
        super().__init__()
        self.mlp, self.place = mlp, place
        self.weight = nn.Parameter(torch.empty(shape, dtype=mlp.store.dtype, device="meta"), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def store(self) -> LayerStore:
        """Where the weights are."""
        return self.mlp.store

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in features] to [..., out features]; the output projection comes after the inputs' pass."""
        if self.place is not None:
            return self.mlp.pre_activation(self.place, x)
        return self.mlp.output(x, self.bias)


class StreamedEmbedding(nn.Module):
    """An embedding table that stays in the checkpoint; only the rows of the tokens at hand are read."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Read rows of the tensor ``name`` [n_tokens, d_model]."""
        super().__init__()
        self._checkpoint, self._name = checkpoint, name
        self.num_embeddings, self.embedding_dim = shape
        self.weight = torch.empty(shape, dtype=dtype, device="meta")  # as a parameter, it would tell the model's device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ``ids`` [...], [..., d_model]."""
        check_rows(ids, self.num_embeddings)  # beyond them lies another tensor
        unique, places = ids.reshape(-1).unique(return_inverse=True)
        stored = self._checkpoint.tensors[self._name].dtype
        rows = torch.empty(len(unique), self.embedding_dim, dtype=stored)
        for row, number in enumerate(unique.tolist()):
            self._checkpoint.read_rows(self._name, number, rows[row : row + 1])
        return rows.to(self.weight.dtype)[places].reshape(*ids.shape, -1)
