"""Two indexes side by side: what differs, and which topics answer one another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreinfer_sim.base.progress import readable_size
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.reporting.overlap import core_masks, in_common


@dataclass(frozen=True)
class Comparison:
    """What two indexes have in common, and what not."""

    name: str
    """Of the other index."""
    facts: list[list[str]]
    """What differs: its name, here, there."""
    topics: list[list[str]]
    """A row a topic of this index: its label, the nearest of the other's, their similarity, and the share of core neurons in
    common where both are of one model."""
    note: str
    """Why topics or their neurons are not compared; empty where they are."""


def compare(
    index: SemanticIndex, other: SemanticIndex, facts: list[list[str]], of_other: list[list[str]]
) -> Comparison:
    """Compare an index with another one.

    Args:
        index: of which the report is.
        other: beside it.
        facts: what there is to say of the first, in rows of a name and a text.
        of_other: the same of the other.
    """
    here, there = ({name: text for name, text in each} for each in (facts, of_other))
    different = [
        [name, here.get(name, "none"), there.get(name, "none")]
        for name in [*here, *(name for name in there if name not in here)]
        if here.get(name) != there.get(name)
    ]
    a, b = index.manifest, other.manifest
    if a.encoder.dimension != b.encoder.dimension or not np.allclose(a.encoder.probe, b.encoder.probe, atol=1e-3):
        return Comparison(other.name, different, [], "The encoders differ, so that topics cannot be compared.")
    similarity = index.centroids @ other.centroids.T
    nearest = similarity.argmax(axis=1)
    layers = [layer for layer in a.settings.layers if layer in b.settings.layers]
    same_model = bool(layers) and a.model.weight_sketch == b.model.weight_sketch and a.model.d_ff == b.model.d_ff
    neurons = [""] * len(index)
    if same_model:
        held = (core_masks(each, a.settings.beta, layers) for each in (index, other))
        common = in_common(*held).mean(axis=0)
        neurons = [f"{common[number, match]:.0%}" for number, match in enumerate(nearest.tolist())]
    topics = [
        [
            f"{number}  {index.clusters[number].label}",
            f"{match}  {other.clusters[match].label}",
            f"{similarity[number, match]:.2f}",
            neurons[number],
        ]
        for number, match in enumerate(nearest.tolist())
    ]
    return Comparison(
        other.name, different, topics, "" if same_model else "The models differ, so that neurons cannot be compared."
    )


def facts_of(index: SemanticIndex) -> list[list[str]]:
    """Return what the index was built from, in rows of two."""
    m = index.manifest
    s = m.settings
    facts = [
        [
            "model",
            f"{m.model.name} ({m.model.family}, {m.model.n_layers} layers, d_ff {m.model.d_ff}, {m.model.dtype})",
        ],
        ["encoder", f"{m.encoder.name} ({m.encoder.dimension} dimensions)"],
        ["corpus", f"{m.corpus.source}: {m.corpus.n_sentences:,} prompts, {m.corpus.n_tokens:,} tokens"],
        ["corpus's checksum", m.corpus.sha256],
        ["settings", f"α {s.alpha}, β {s.beta}, γ {s.gamma}, seed {s.seed}, {len(s.layers)} recorded layers"],
        ["size", readable_size(sum(entry.size for entry in m.files.values()))],
    ]
    facts += [["compensated sets", f"keep ratio {each.keep_ratio:g}, {each.budget} budget"] for each in m.compensation]
    facts += [[f"profile {name}", info.in_words()] for name, info in m.profiles.items()]
    return facts
