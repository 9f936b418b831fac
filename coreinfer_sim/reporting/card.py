"""The page that stands above an index on a hub: what it is, what was measured, and whose licences hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coreinfer_sim.base.plain import plain
from coreinfer_sim.base.progress import counted, readable_size
from coreinfer_sim.index.clusters import Cluster
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import CorpusInfo, EncoderInfo, Manifest, ModelInfo, ProfileInfo
from coreinfer_sim.index.places import is_local

CARD_FILE = "README.md"
PICTURE_FILE = "map.png"
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")
_MOST_TOPICS = 50


def without_places(manifest: Manifest) -> Manifest:
    """Return a manifest that says what model, encoder and corpus are called, and not where they lay when it was built."""

    def name_of(info: ModelInfo | EncoderInfo) -> str:
        # a name that begins with a point is no hub's id, so that it is looked for by this name alone
        return f"./{Path(info.name).name}" if is_local(info) else info.name

    places: dict[str, Any] = {"path": None, "relative_path": None}
    return replace(
        manifest,
        model=replace(manifest.model, name=name_of(manifest.model), **places),
        encoder=replace(manifest.encoder, name=name_of(manifest.encoder), **places),
        corpus=replace(manifest.corpus, source=_source(manifest.corpus)),
    )


def card(
    index: SemanticIndex,
    repository: str,
    licence: str | None = None,
    commands: Sequence[str] = (),
    has_picture: bool = False,
) -> str:
    """Return the page of an index on a hub, in Markdown with the hub's metadata before it.

    Labels of topics are a stranger's: what would be markup in them is escaped.

    Args:
        index: to describe.
        repository: its id on the hub, USER/NAME.
        licence: of the index, as the hub abbreviates it; None: it is not stated.
        commands: that fetch and use it.
        has_picture: whether a picture of the map lies beside the page.
    """
    from huggingface_hub import ModelCardData

    manifest = without_places(index.manifest)
    model, name = manifest.model, repository.rpartition("/")[2]
    data = ModelCardData(
        library_name="coreinfer_sim",
        tags=["coreinfer-sim", "semantic-index"],
        base_model=None if is_local(model) else model.name,
        license=licence,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_text(name)}",
        f"An index for coreinfer_sim. It decodes {_text(Path(model.name).name)} from the neurons that a token needs, on texts "
        f"like those of {_text(manifest.corpus.source)}: {counted(len(index), 'topic')} over "
        f"{counted(manifest.corpus.n_sentences, 'prompt')}.",
        *(["\n".join(f"    {command}" for command in commands)] if commands else []),
        *([f"![Prompts by meaning]({PICTURE_FILE})"] if has_picture else []),
        "## What it loses and gains",
        _profiles(manifest),
        "## Topics",
        _topics(index.clusters),
        "## Built from",
        _table(("", ""), [[title, _text(value)] for title, value in _facts(manifest)]),
        "## Licences",
        f"The licence of the index: {_text(licence or 'not stated')}. It holds statistics of the model {_text(model.name)}, and "
        f"{'the beginnings' if _has_texts(manifest) else 'words'} of texts of {_text(manifest.corpus.source)}, whose own "
        "licences hold for these. It holds no weights"
        + (" but output rows that were fitted to the model's own." if manifest.compensation or manifest.refit else "."),
    ]
    return "\n\n".join(parts) + "\n"


def _source(corpus: CorpusInfo) -> str:
    """Return what a corpus is called, without the folders that it lay in."""
    path = Path(corpus.source)
    return path.name if path.is_absolute() or path.exists() or len(path.parts) > 2 else corpus.source


def _has_texts(manifest: Manifest) -> bool:
    return manifest.map is None or manifest.map.texts


def _profiles(manifest: Manifest) -> str:
    if not manifest.profiles:
        return "Nothing was measured: decode is dense unless a ratio is named."
    rows = [[name, *_measured(info)] for name, info in manifest.profiles.items()]
    columns = ("profile", "each token reads", "perplexity", "95 % interval", "MB a token", "fewer bytes")
    return (
        _table(columns, rows) + "\n\nPerplexity is beside the dense model's, on texts that the index was not built on."
    )


def _measured(info: ProfileInfo) -> list[str]:
    how = (
        "all" if info.is_dense else f"{info.read_ratio:.0%} of the neurons" if not info.of_sets else "the held neurons"
    )
    size = "–" if info.total_bytes is None else f"{info.total_bytes / 1e6:.0f}"
    gain = "–" if info.gain is None else f"{info.gain:.0%}"
    return [how, f"{info.ratio - 1:+.1%}", f"{info.low - 1:+.1%} to {info.high - 1:+.1%}", size, gain]


def _topics(clusters: list[Cluster]) -> str:
    rows = [[str(each.id), f"{each.size:,}", _text(each.label)] for each in clusters[:_MOST_TOPICS]]
    left = len(clusters) - len(rows)
    return _table(("", "prompts", "topic"), rows) + (f"\n\nAnd {left:,} more." if left else "")


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    model, settings = manifest.model, manifest.settings
    return [
        ("model", f"{model.name} ({model.family}, {model.n_layers} layers, d_ff {model.d_ff}, {model.dtype})"),
        ("encoder", f"{manifest.encoder.name} ({manifest.encoder.dimension} dimensions)"),
        (
            "corpus",
            f"{manifest.corpus.source}: {manifest.corpus.n_sentences:,} prompts, {manifest.corpus.n_tokens:,} tokens",
        ),
        ("settings", f"α {settings.alpha}, β {settings.beta}, γ {settings.gamma}, seed {settings.seed}"),
        ("size", readable_size(sum(entry.size for entry in manifest.files.values()))),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.versions.items())),
    ]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: str) -> str:
    """Return a text as Markdown that shows just that."""
    return _MARKUP.sub(r"\\\1", plain(value))
