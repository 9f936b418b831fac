"""Loads a language model, and knows where its MLPs are, where their weights lie, and what passes through them."""

__all__ = [
    "budgeted",
    "chat_templates",
    "experts",
    "fingerprint",
    "gguf_codes",
    "kept",
    "layout_file",
    "loading",
    "mending",
    "mixtures",
    "mlps",
    "offload",
    "positions",
    "prompts",
    "sharing",
    "store",
    "streaming",
    "structure",
    "taps",
    "weightless",
]
