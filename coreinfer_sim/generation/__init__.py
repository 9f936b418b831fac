"""Turns a prompt into a text: dense prefill, decode by an engine, and what it cost."""

__all__ = [
    "budget",
    "exported",
    "in_process",
    "memory_plan",
    "opening",
    "prefix_cache",
    "reading",
    "routing",
    "sparse_model",
    "streaming",
    "text",
    "turns",
    "watch",
]
