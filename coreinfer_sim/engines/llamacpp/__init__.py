"""Runs exported files in llama.cpp, which owns the whole loop."""
