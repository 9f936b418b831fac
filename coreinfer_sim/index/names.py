"""Indexes by name: those in the user's data folder, and the ready-made one that comes with the package."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import platformdirs

from coreinfer_sim.base.errors import ConfigError, IndexFormatError
from coreinfer_sim.base.files import replacing
from coreinfer_sim.base.stores import is_address
from coreinfer_sim.index.manifest import MANIFEST_FILE
from coreinfer_sim.index.remote import fetched

DEMO = "demo"
"""Name of the ready-made index, unless the user has one of that name."""
DEMO_FOLDER = Path(__file__).with_name("demo")
_NAME = re.compile(r"\w[\w.+-]*")
_WORK = ".build"
"""Ends the name of a folder in which a build is at work."""


def indexes_folder() -> Path:
    """Return where indexes lie that have a name: ``indexes`` in the user's data folder."""
    return platformdirs.user_data_path("coreinfer_sim", appauthor=False) / "indexes"


def own_indexes() -> dict[str, Path]:
    """Return the folders of the user's indexes by name, in alphabetical order."""
    folders = sorted(indexes_folder().glob(f"*/{MANIFEST_FILE}"))
    return {path.parent.name: path.parent for path in folders if _is_name(path.parent.name)}


def known_indexes() -> dict[str, Path]:
    """Return the folders of all indexes that have a name: the user's own, and the ready-made one."""
    return {DEMO: DEMO_FOLDER, **own_indexes()}


def folder_of(given: str | Path) -> Path:
    """Return the folder of an index that is given by its name or its path.

    What lies at an address, such as ``s3://bucket/index``, is copied into the cache. A text with a separator is a path, and so is
    the name of an index folder in the working directory; else it is a name.

    Raises:
        IndexFormatError: there is no index of that name.
    """
    if is_address(given):
        return fetched(str(given))
    path = Path(given)
    if isinstance(given, Path) or not _is_name(given) or (path / MANIFEST_FILE).is_file():
        return path
    known = known_indexes()
    if given in known or path.exists():
        return known.get(given, path)
    raise IndexFormatError(
        f"there is no index {given!r}, neither a folder in {Path.cwd()} nor a name in {indexes_folder()}, expected one of "
        f"{', '.join(known)}; 'coreinfer-sim list' shows them, and 'coreinfer-sim build-index' makes one."
    )


def own_folder(name: str) -> Path:
    """Return the folder of one of the user's own indexes, whole or not.

    Raises:
        ConfigError: the user has none of that name, or it is the one that comes with the package.
    """
    folder = indexes_folder() / name
    if _is_name(name) and (folder.is_dir() or unfinished(folder).is_dir()):
        return folder
    if name == DEMO:
        raise ConfigError(f"the index {DEMO!r} comes with the package, expected one of your own; leave it.")
    own = ", ".join(own_indexes()) or "no index yet"
    raise ConfigError(
        f"there is no index {name!r} in {indexes_folder()}, expected one of your own: {own}; 'coreinfer-sim list' shows them."
    )


def is_ready_made(folder: Path) -> bool:
    """Return whether a folder is the index that comes with the package."""
    return os.path.realpath(folder) == os.path.realpath(DEMO_FOLDER)


def check_no_own_demo() -> None:
    """Raise ConfigError if the user has an index of the ready-made one's name, which a copy of that would replace."""
    if DEMO in own_indexes():
        raise ConfigError(
            f"{DEMO_FOLDER} comes with the package and stays as it is, and you have an index {DEMO!r} in {indexes_folder()}, "
            "expected one of your own; name that."
        )


def copy_demo() -> Path:
    """Copy the ready-made index into the user's data folder, where its name then stands for the copy; return that.

    Raises:
        ConfigError: as `check_no_own_demo`.
    """
    check_no_own_demo()
    folder = indexes_folder() / DEMO
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder, MANIFEST_FILE) as part:
        part.mkdir()
        for path in DEMO_FOLDER.iterdir():  # without its permissions, which may be those of a system's package
            shutil.copyfile(path, part / path.name)
    return folder


def unfinished(folder: Path) -> Path:
    """Return where a build of an index is at work, or was broken off."""
    return folder.with_name(folder.name + _WORK)


def place_of_new(given: str) -> Path:
    """Return the folder that a new index is written to: a text without a separator is a name, unless such a folder is here."""
    path = Path(given)
    is_here = path.exists() or unfinished(path).exists() if path.name else True
    return indexes_folder() / given if _is_name(given) and not is_here else path


def name_for(corpus: str) -> str:
    """Return a name for an index over a corpus: what its file, folder or data set is called, without endings."""
    stem = Path(corpus).name.split(".")[0]
    return re.sub(r"[^\w+-]+", "-", stem).strip("-+") or "index"


def _is_name(text: str) -> bool:
    return (
        os.sep not in text and _NAME.fullmatch(text) is not None and not text.endswith(_WORK)
    )  # a pattern of its own keeps ~, . and .. out
