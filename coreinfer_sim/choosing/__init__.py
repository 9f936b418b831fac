"""Which neurons decode holds for a prompt."""
