"""Lays held neurons out, reads and multiplies them: engines behind one face."""

__all__ = [
    "calibration",
    "cutting",
    "face",
    "in_transformers",
    "llamacpp",
    "modules",
    "prepared",
    "registry",
    "sizes",
    "steps",
]
