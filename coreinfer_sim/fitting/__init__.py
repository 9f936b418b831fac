"""Sets whose held neurons make up for the dropped ones."""

__all__ = ["clustered_corpus", "comparing", "costs", "pipeline", "refit", "workers"]
