"""Serves the OpenAI API and a page over a backend that generates."""

__all__ = ["app", "backends", "on_ray"]
