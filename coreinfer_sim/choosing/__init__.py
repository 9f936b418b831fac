"""Chooses which neurons decode holds for a prompt."""

__all__ = ["compatibility", "index_sets", "make", "predictors", "promised", "prompt_reader", "selection", "statistics"]
