"""A prompt to a text: dense prefill, decode by an engine, and what it cost."""
