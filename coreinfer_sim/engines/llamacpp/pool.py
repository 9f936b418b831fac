"""Open models, of which the least recently used are closed to keep under a limit."""

from __future__ import annotations

import gc
from collections import OrderedDict
from pathlib import Path

from coreinfer_sim.base.errors import ConfigError, ModelError
from coreinfer_sim.base.progress import readable_size
from coreinfer_sim.engines.llamacpp.server import LlamaServer


class ModelPool:
    """Models that are opened on first use; the least recently used ones are closed to keep under a limit."""

    def __init__(self, limit: int | None, folder: str, context: int, n_threads: int | None = None) -> None:
        """Hold no model yet.

        Args:
            limit: bytes of files that may be open at a time; None sets no limit.
            folder: for caches that models save.
            context: positions of each model's cache.
            n_threads: of llama.cpp; None leaves its own choice.
        """
        self._limit, self._folder, self._context, self._n_threads = limit, folder, context, n_threads
        self._open: OrderedDict[Path, LlamaServer] = OrderedDict()

    def get(self, path: Path, beside: Path | None = None) -> LlamaServer:
        """Return a model, opened if it is not.

        Args:
            path: of its file.
            beside: a file whose model must stay open.

        Raises:
            ConfigError: the limit is too small for what must be open together.
            ModelError: there is no such file, or llama.cpp cannot load it.
        """
        if path not in self._open:
            for each in (path, beside):
                if each is not None and not each.is_file():
                    raise ModelError(f"there is no file {each}, expected an exported model; export it anew.")
            self._make_room(path, beside)
            self._open[path] = LlamaServer(path, self._folder, self._context, self._n_threads)
        self._open.move_to_end(path)
        return self._open[path]

    def _make_room(self, path: Path, beside: Path | None) -> None:
        """Close models until another fits under the limit."""
        if self._limit is None:
            return
        n_bytes = path.stat().st_size
        together = n_bytes + (0 if beside is None else beside.stat().st_size)
        if together > self._limit:
            raise ConfigError(
                f"memory_limit is {readable_size(self._limit)}, but {readable_size(together)} must be open at a time "
                f"({path.name}{'' if beside is None else f' beside {beside.name}'}); raise it"
                + ("." if beside is None else ", or set prefill to sparse.")
            )
        for other in [each for each in self._open if each != beside]:
            if self.n_bytes + n_bytes <= self._limit:
                break
            del self._open[other]
            gc.collect()

    @property
    def paths(self) -> list[Path]:
        """The files that are open, the least recently used first."""
        return list(self._open)

    @property
    def n_bytes(self) -> int:
        """Bytes of the files that are open."""
        return sum(path.stat().st_size for path in self._open)

    def close(self) -> None:
        """Close all models."""
        self._open.clear()
        gc.collect()
