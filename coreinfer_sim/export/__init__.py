"""A cluster as an ordinary, smaller model: a checkpoint or a GGUF file."""
