"""Measures decode speed beside other programs, which take turns in processes of their own."""

__all__ = ["bench", "machine", "native", "plot", "programs", "prompts", "shapes", "specs"]
