"""Compiled loops that decode on a CPU."""
