"""Which topics a server is asked about, counted where its operator wants it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

from coreinfer_sim.base.errors import CoreInferSimError
from coreinfer_sim.generation.routing import routing_text
from coreinfer_sim.index.asked import add_asked
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.serving.backends import Completion, TextRequest

_log = logging.getLogger(__name__)
_EVERY = 30.0
"""Seconds between two writes, if prompts come."""


class TopicLog:
    """Counts prompts by topic, and adds the counts to the index's now and then."""

    def __init__(self, index: SemanticIndex) -> None:
        """Count for an index."""
        self._index = index
        self._prompts: Counter[int] = Counter()
        self._unfamiliar: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._written = time.monotonic()

    def count(self, request: TextRequest, completion: Completion) -> None:
        """Count a request that was answered; one that was answered without routing is looked up for it."""
        cluster, confident = completion.facts.get("cluster"), completion.facts.get("confident")
        if cluster is None or confident is None:
            match = self._index.lookup(routing_text(self._index, request.prompt))[0]
            cluster, confident = match.cluster, match.confident
        with self._lock:
            self._prompts[cluster] += 1
            self._unfamiliar[cluster] += not confident
            due = time.monotonic() - self._written > _EVERY
        if due:
            self.write()

    def write(self) -> None:
        """Add what was counted to the index's counts; what cannot be written is kept for the next time."""
        with self._lock:
            self._written = time.monotonic()
            if not self._prompts:
                return
            try:
                add_asked(self._index.manifest, self._prompts, +self._unfamiliar)
            except (OSError, CoreInferSimError) as error:
                _log.warning("topics cannot be counted: %s", error)
                return
            self._prompts, self._unfamiliar = Counter(), Counter()
