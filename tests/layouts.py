"""Layouts of weights in a cache folder, and what is said of them."""

from __future__ import annotations

import json
import zlib

import coreinfer_sim
from coreinfer_sim.base.progress import Progress

PROMPT = "How do stars form?"


class Said(Progress):
    """What was said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def text_of(name, said=None, mode="dense", **settings):
    """Twelve tokens."""
    with coreinfer_sim.load(None, str(name), mode=mode, progress=said, **settings) as generator:
        return generator.generate(PROMPT, max_new_tokens=12, ignore_eos=True).text


def folders(cache):
    """The layouts that lie there."""
    return sorted(path for path in cache.iterdir() if path.is_dir() and path.name != "sources")


def rewrite(place, change):
    """Change the manifest of a layout, and its checksum."""
    path = place / "layout.json"
    outer = json.loads(path.read_text())
    inner = json.loads(outer["content"])
    change(inner)
    outer["content"] = json.dumps(inner)
    outer["crc32"] = zlib.crc32(outer["content"].encode())
    path.write_text(json.dumps(outer))
