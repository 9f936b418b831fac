"""What the server counts for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from coreinfer_sim.serving.backends import Completion


class Metrics:
    """Counters of one request queue."""

    def __init__(self, n_open: Callable[[], int]) -> None:
        """Count in a registry of its own; ``n_open`` returns how many requests wait or are being answered."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"coreinfer_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"coreinfer_{name}", text, registry=self.registry)

        self.requests = counter("requests", "Requests by how they ended.", "outcome")
        self._new_tokens = counter("new_tokens", "Tokens generated.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens read as prompts.")
        self._clusters = counter("cluster_hits", "Answers by cluster.", "cluster")
        self._modes = counter("answers", "Answers by the mode that made them.", "mode")
        self._swaps = counter("swaps", "Answers whose neurons were not those of the answer before.")
        self._fallbacks = counter("fallbacks", "Prompts that were unfamiliar to their cluster.")
        self._seconds = Histogram(
            "coreinfer_answer_seconds", "Time of an answer, waiting left out.", registry=self.registry
        )
        self._speed = gauge("tokens_per_second", "Decode speed of the latest answer.")
        gauge("queue", "Requests that wait or are being answered.").set_function(n_open)
        self._latest: tuple[object, object] | None = None

    def count(self, completion: Completion, seconds: float) -> None:
        """Count a finished text, which took so many seconds."""
        facts = completion.facts
        self._seconds.observe(seconds)
        self._new_tokens.inc(completion.n_new_tokens)
        self._prompt_tokens.inc(completion.n_prompt_tokens)
        self._modes.labels(facts["mode"]).inc()
        if facts.get("cluster") is not None:
            self._clusters.labels(str(facts["cluster"])).inc()
            if facts.get("confident") is False:
                self._fallbacks.inc()
        if facts.get("tokens_per_second"):
            self._speed.set(facts["tokens_per_second"])
        now = facts["mode"], facts.get("cluster")
        if self._latest is not None and now != self._latest:
            self._swaps.inc()
        self._latest = now
