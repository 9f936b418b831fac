"""Says on one page what an index is and what was measured with it, and shares it on a hub."""

__all__ = ["card", "differences", "report", "sharing"]
