"""Writes clusters as ordinary, smaller models: checkpoints of transformers, or GGUF files for llama.cpp."""

__all__ = ["checkpoint", "export", "gguf", "weights"]
