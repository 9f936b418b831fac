"""Measures quality as the engine that decodes gives it, beside what one would take instead."""

__all__ = ["compare", "contenders", "harness", "plot", "results", "rows", "run", "summary", "text_scores", "tune"]
