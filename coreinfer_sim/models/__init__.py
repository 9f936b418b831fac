"""A loaded language model: where its MLPs are, where their weights lie, and what passes through them."""
