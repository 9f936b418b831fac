"""llama.cpp on exported files."""
