"""How held neurons are laid out, read and multiplied."""
