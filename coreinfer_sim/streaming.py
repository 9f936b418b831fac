"""Dense layers whose weights stay on disk: read block by block while the layer computes, in one pass over its store.

The owner's own forward code runs unchanged. The first input projection it calls reads the layer's neurons once and
computes everything; the other projections hand out what is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from coreinfer_sim.checkpoint import Checkpoint
from coreinfer_sim.errors import GenerationError
from coreinfer_sim.store import LayerStore

SCRATCH = 24 << 20
"""Bytes of the buffers that all layers share."""
_RAW = 8 << 20


class Scratch:
    """Buffers that all layers of a model share: two blocks as stored, of which one is read while the other is used."""

    def __init__(self, store: LayerStore, compute: torch.dtype) -> None:
        """Make buffers for blocks of ``store``'s shape; products are computed in the dtype ``compute``."""
        self.compute = compute
        self.block_bytes = _RAW
        (_, n), *_ = store.ranges(_RAW)
        shape = n, store.n_parts, store.d_model
        self._raw = [torch.empty(shape, dtype=store.dtype) for _ in range(2)]
        self._wide = None if compute is store.dtype else torch.empty(n, store.d_model, dtype=compute)
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
        """Return one part of a block, [n, d_model], in the dtype that computes; it lasts until the next call."""
        if self._wide is None:
            return weight
        return self._wide[: len(weight)].copy_(weight)


class StreamedMLP:
    """One layer's dense MLP, computed from its store."""

    def __init__(
        self, store: LayerStore, scratch: Scratch, act: Callable[[torch.Tensor], torch.Tensor], gated: bool
    ) -> None:
        """Compute with the activation function ``act``; ``bind`` adds the projections."""
        self.store = store
        self._scratch, self._act, self._gated = scratch, act, gated
        self._inputs: list[StreamedLinear] = []
        self._x: torch.Tensor | None = None
        self._pre: list[torch.Tensor] = []
        self._sum: torch.Tensor | None = None

    def bind(self, inputs: list[StreamedLinear]) -> None:
        """Say which projections go from d_model to d_ff."""
        self._inputs = inputs

    def pre_activation(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return what input projection ``place`` gives for ``x`` [..., d_model]."""
        if x is not self._x:
            self._run(x)
        pre, self._pre[place] = self._pre[place], self._pre[place].new_empty(0)
        return pre

    def output(self) -> torch.Tensor:
        """Return what the output projection gives for the latest ``x``, without its bias."""
        if self._sum is None:
            raise GenerationError(
                "an MLP on disk was asked for its output before its input, expected the model's own forward."
            )
        y, self._sum, self._x, self._pre = self._sum, None, None, []
        return y

    @torch.no_grad()
    def _run(self, x: torch.Tensor) -> None:
        store, scratch = self.store, self._scratch
        flat = x.reshape(-1, x.shape[-1])
        used = flat.to(scratch.compute)
        pre = [flat.new_empty(len(flat), projection.weight.shape[0]) for projection in self._inputs]
        total = torch.zeros(len(flat), store.d_model, dtype=torch.float32)
        for begin, end, block in scratch.blocks(store):
            parts = []
            for part in range(store.n_parts - 1):
                place = min(part, len(pre) - 1)
                at = begin + (part - place) * store.d_ff  # the second half, if gate and up are fused
                bias = self._inputs[place].bias
                h = F.linear(
                    used,
                    scratch.widened(block[:, part]),
                    None if bias is None else bias[at : at + end - begin].to(used),
                )
                parts.append(h.to(x.dtype))
                pre[place][:, at : at + end - begin] = parts[-1]
            z = self._act(parts[0]) * parts[1] if self._gated else self._act(parts[0])
            weight = scratch.widened(block[:, -1])
            if scratch.compute is torch.float32:
                total.addmm_(z.float(), weight)
            else:
                total += (z @ weight).float()
        self._x = x
        self._pre = [p.reshape(*x.shape[:-1], -1) for p in pre]
        self._sum = total.to(x.dtype).reshape(*x.shape[:-1], -1)


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
        """Map [..., in features] to [..., out features]; the output projection's sums were made with the inputs'."""
        if self.place is not None:
            return self.mlp.pre_activation(self.place, x)
        y = self.mlp.output()
        return y if self.bias is None else y + self.bias


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
        unique, places = ids.reshape(-1).unique(return_inverse=True)
        stored = self._checkpoint.tensors[self._name].dtype
        rows = torch.empty(len(unique), self.embedding_dim, dtype=stored)
        for row, number in enumerate(unique.tolist()):
            self._checkpoint.read_rows(self._name, number, rows[row : row + 1])
        return rows.to(self.weight.dtype)[places].reshape(*ids.shape, -1)
