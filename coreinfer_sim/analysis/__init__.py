"""Measures what core neurons are on any model and corpus, every number with an interval."""

__all__ = ["analyze", "plot"]
