"""Compiled loops that decode Llama-like models on a CPU."""
