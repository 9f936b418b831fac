"""A corpus to an index, each stage kept on disk."""

__all__ = ["build", "status"]
