"""Where the model and the encoder lie that an index names: it may be used from anywhere, and be moved together with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from coreinfer_sim.base.errors import MissingEncoderError, MissingModelError
from coreinfer_sim.base.files import cache_folder
from coreinfer_sim.index.manifest import EncoderInfo, ModelInfo

SEARCH_PATH = "COREINFER_SIM_MODELS"
"""Environment variable with folders of models, parted as in PATH."""
DEMO_MODEL = "smollm2-135m-instruct-q4_1.gguf"
"""File of the model of the ready-made index."""
_CONFIGS = ("config.json", "modules.json")


def places_of(name: str, folder: Path) -> dict[str, str]:
    """Return where a model lies as fields of `ModelInfo` and `EncoderInfo`; nothing for one of the hub.

    Args:
        name: of the model, as a build was given it.
        folder: of the index.
    """
    if not _is_there(Path(name)):
        return {}
    found = {"path": os.path.abspath(name)}
    with suppress(ValueError):  # on another drive
        found["relative_path"] = os.path.relpath(os.path.realpath(name), os.path.realpath(folder))
    return found


def find(info: ModelInfo | EncoderInfo, folder: Path | None, index: str) -> str:
    """Return the place of the model that an index names, or the name as it is where that is of the hub.

    It is looked for where it lay beside the index, then as it is named, then around the index, then where the build found it,
    then in the folders of models. That it is the same model is checked by its weights once it is loaded.

    Args:
        info: what the manifest says.
        folder: of the index; None: it was never on disk.
        index: its name, for messages.

    Raises:
        MissingModelError: it is named by a path, and is nowhere there; of an encoder MissingEncoderError.
    """
    name = Path(info.name)
    local = is_local(info)
    beside = [] if folder is None or info.relative_path is None else [os.path.normpath(folder / info.relative_path)]
    if any(_is_same(place, info.name) for place in beside):
        beside = []  # the name as it was given reads better
    near = [] if folder is None else _near(info, folder, local)
    for place in (*beside, info.name, *near, info.path, *_searched(info)):
        if place is not None and _is_there(Path(place)):
            return str(place)
    if not local:
        return info.name
    what, kind = (
        ("sentence encoder", MissingEncoderError) if isinstance(info, EncoderInfo) else ("model", MissingModelError)
    )
    raise kind(
        f"{index} names the {what} {info.name}, which is neither in this folder nor beside or above the index"
        + ("" if info.path in (None, info.name) else f" nor at {info.path}")
        + f" nor in {' or '.join(map(str, model_folders()))}, expected it at one of these; "
        + (
            "fetch it by 'coreinfer-sim demo', or give the model's present place."
            if name.name == DEMO_MODEL
            else f"put it there, name its folder in {SEARCH_PATH}, or give the {what}'s present place."
        )
    )


def is_local(info: ModelInfo | EncoderInfo) -> bool:
    """Return whether a model is named by a path, rather than by an id of the hub."""
    name = Path(info.name)
    return info.path is not None or name.suffix == ".gguf" or name.is_absolute() or info.name.startswith((".", "~"))


def model_folders() -> list[Path]:
    """Return the folders of models that are searched: those of ``COREINFER_SIM_MODELS``, and the one that fetched ones lie in."""
    named = os.environ.get(SEARCH_PATH, "").split(os.pathsep)
    return [*(Path(each) for each in named if each), cache_folder("models")]


def _near(info: ModelInfo | EncoderInfo, folder: Path, local: bool) -> Iterator[Path]:
    """Yield places relative to an index folder."""
    if not Path(info.name).is_absolute():
        yield from (Path(os.path.normpath(each / info.name)) for each in (folder, *folder.parents))
    if local and Path(info.name).name:
        yield from (each / Path(info.name).name for each in (folder, folder.parent))


def _searched(info: ModelInfo | EncoderInfo) -> Iterator[Path]:
    """Yield places in the folders of models: by the name as it is, and by its last part."""
    name = Path(info.name)
    if name.name:
        yield from (each / part for each in model_folders() for part in dict.fromkeys((name, Path(name.name))))


def _is_same(place: str, name: str) -> bool:
    return os.path.exists(place) and os.path.exists(name) and os.path.samefile(place, name)


def _is_there(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in _CONFIGS)
