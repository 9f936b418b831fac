"""Says on one page what an index is, and what was measured with it."""

__all__ = ["differences", "report"]
