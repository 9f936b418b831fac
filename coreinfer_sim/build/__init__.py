"""Building an index: stages, shards, restart and processes; the mathematics is elsewhere."""

from coreinfer_sim.build.builder import build_index
from coreinfer_sim.progress import Progress

__all__ = ["Progress", "build_index"]
