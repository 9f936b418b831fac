"""Groups texts by meaning, finds the group of a new one, and keeps all that in a checked folder."""

__all__ = [
    "asked",
    "checks",
    "clustering",
    "clusters",
    "compensated",
    "encoder",
    "index",
    "labels",
    "manifest",
    "names",
    "places",
    "plot",
    "prompt_map",
    "ranking",
    "remote",
    "storage",
    "sums",
    "verified",
]
