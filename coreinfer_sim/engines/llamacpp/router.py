"""``router.json``: which prompt goes to which exported file. Its format is known here only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.files import write_json
from coreinfer_sim.base.settings import UNFAMILIAR
from coreinfer_sim.index.index import SemanticIndex

ROUTER_FILE = "router.json"
SIMILARITY, GLOBAL, DENSE = "similarity", "global", "dense"
"""Modes of an export; the last two also name their sets: that of the whole corpus, and the whole model."""


@dataclass(frozen=True)
class Router:
    """The exported files of an index."""

    folder: Path
    files: Mapping[int | str, str]
    """Names of files in the folder by the number of their cluster, GLOBAL or DENSE; those that were exported."""
    chat_template: str | None = None
    """Of the model; None: it has none, or an earlier release wrote the export."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """That the template may name."""

    @property
    def modes(self) -> list[str]:
        """Modes that the files allow."""
        clusters = any(isinstance(which, int) for which in self.files)
        return [mode for mode in (SIMILARITY, GLOBAL, DENSE) if mode in self.files or (mode == SIMILARITY and clusters)]

    def path(self, which: int | str) -> Path:
        """Return the file of a cluster, GLOBAL or DENSE.

        Raises:
            ConfigError: it was not exported.
        """
        if which not in self.files:
            title = which if isinstance(which, str) else f"cluster {which}"
            raise ConfigError(
                f"{self.folder} lacks {title}, expected all sets that prompts may need; export all clusters, global and dense as "
                "GGUF with their router."
            )
        return self.folder / self.files[which]


def write_router(
    folder: Path,
    index: SemanticIndex,
    paths: Mapping[int | str, Path],
    keep_ratio: float,
    compensated: bool,
    template: tuple[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write what a front end needs to route: embed, take the centroid with the largest inner product, open its file.

    Args:
        folder: where to.
        index: the index.
        paths: of the exported models, by the number of their cluster, GLOBAL or DENSE.
        keep_ratio: of the models.
        compensated: whether they are.
        template: the model's chat template, and the special tokens that it may name.

    Returns:
        The written file.
    """
    encoder = index.manifest.encoder
    names = {which: path.name for which, path in paths.items()}
    content = {
        "model": index.manifest.model.name,
        "keep_ratio": keep_ratio,
        "compensated": compensated,
        "encoder": {
            "name": encoder.name,
            "dimension": encoder.dimension,
            "normalized": True,
            "metric": "inner product",
        },
        "chat_template": None if template is None else template[0],
        "special_tokens": {} if template is None else dict(template[1]),
        "unfamiliar_below_quantile": UNFAMILIAR,
        "fallback": names.get(GLOBAL),
        "dense": names.get(DENSE),
        "bytes": {path.name: path.stat().st_size for path in paths.values() if path.is_file()},
        "clusters": [
            {
                "id": cluster.id,
                "label": cluster.label,
                "size": cluster.size,
                "file": names.get(cluster.id),
                "similarity_quantiles": cluster.similarity_quantiles,
                "centroid": [float(f"{value:.8g}") for value in index.centroids[cluster.id].tolist()],
            }
            for cluster in index.clusters
        ],
    }
    write_json(folder / ROUTER_FILE, content)
    return folder / ROUTER_FILE


def read_router(folder: Path, index: SemanticIndex) -> Router:
    """Read ``router.json``, and check that it was exported from this index, as GGUF, and that its files are whole.

    Raises:
        ConfigError: it was not, or they are not.
    """
    path = folder / ROUTER_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes = [cluster["size"] for cluster in content["clusters"]]
        names: dict[int | str, str | None] = {
            **{number: cluster["file"] for number, cluster in enumerate(content["clusters"])},
            GLOBAL: content["fallback"],
            DENSE: content["dense"],
        }
        written = dict(content["bytes"])
        template, special_tokens = content.get("chat_template"), dict(content.get("special_tokens", {}))
    except OSError as error:
        raise ConfigError(
            f"{folder} has no {ROUTER_FILE}, expected an export; export all clusters as GGUF with their router."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); export anew.") from error
    if sizes != [cluster.size for cluster in index.clusters]:
        raise ConfigError(f"{path} belongs to another index than {index.name}; export this one.")
    files = {which: name for which, name in names.items() if name is not None}
    for name in files.values():
        if Path(name).name != name or not name.endswith(".gguf"):
            raise ConfigError(f"{path} names {name}, expected GGUF files beside it; export as GGUF.")
        file = folder / name
        if name in written and file.is_file() and file.stat().st_size != written[name]:
            raise ConfigError(f"{file} has {file.stat().st_size} bytes, export wrote {written[name]}; export it anew.")
    return Router(folder, files, template, special_tokens)
