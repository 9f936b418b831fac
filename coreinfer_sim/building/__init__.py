"""A corpus to an index, each stage kept on disk."""

__all__ = ["build", "extending", "joining", "merging", "splitting", "status"]
