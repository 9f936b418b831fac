"""Reading a GGUF file through transformers without doing the same work several times."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import gguf

_LOCK = threading.RLock()


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block parse a GGUF file once, and make the map of its tensors' names once.

    transformers parses the file anew for configuration, tokenizer and weights, and makes the map anew for every module of
    the model, which takes longer than to read the weights. Also a decorator.
    """
    names = ("GGUFReader", "get_tensor_name_map")
    with _LOCK:
        before = {name: getattr(gguf, name) for name in names}
        try:
            for name, function in before.items():
                setattr(gguf, name, lru_cache(maxsize=1)(function))
            yield
        finally:
            for name, function in before.items():
                setattr(gguf, name, function)
