"""Which files a corpus is: by their names, of what kind, and in a folder which belong to the split."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath
from typing import TypeVar

from coreinfer_sim.base.errors import CorpusError
from coreinfer_sim.base.progress import counted
from coreinfer_sim.base.stores import AnyFile, RemoteFile, is_address

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
_PACKED = (".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""What files and folders of a split are called, as `datasets` knows them."""
_OF_HUBS = {"config.json", "dataset_infos.json"}
"""Files of a data set that hold no rows."""
File = TypeVar("File", Path, RemoteFile)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_file_name(name: str) -> bool:
    """Tell whether a name ends as the files do that are read."""
    return _suffix(Path(name)) in KINDS


def set_name(source: str) -> str:
    """Return what rows of a source are called together: the file's name without its endings, or the name on the hub."""
    name = Path(source).name
    return re.sub(rf"(?i)({'|'.join(map(re.escape, KINDS))})?(\.gz)?$", "", name) or name


def check_there(source: str) -> None:
    """Raise CorpusError if a source is no file and no folder, and cannot be the id of a data set on the hub.

    Raises:
        UnreachableError: it is at an address that cannot be reached.
    """
    if source and Path(source).exists():
        return
    if is_address(source):
        if not RemoteFile(source).exists():
            raise CorpusError(f"there is nothing at {source}, expected a corpus; check the address and the network.")
        return
    if is_file_name(source) or _suffix(Path(source)) in _PACKED or not _HUB_ID.fullmatch(source):
        several = (
            "; the characters * and ? stand for themselves, so name one file, or a folder of them"
            if (set("*?") & set(source))
            else "; check the path"
        )
        raise CorpusError(f"there is no file or folder {source!r}, expected a corpus{several}.")


def kind_of(path: AnyFile) -> str:
    """Return the ending of a file that tells how it is read.

    Raises:
        CorpusError: it is of no kind that is read, or is empty.
    """
    suffix = _suffix(path)
    if suffix in _PACKED or (suffix == ".parquet" and path.suffix.lower() == ".gz"):
        raise CorpusError(f"the corpus {path} is packed, expected a {', '.join(KINDS)} or .gz file; unpack it first.")
    if not path.is_file():
        raise CorpusError(
            f"the corpus {path} is a pipe or a device, expected a file, which is read twice; write it to one."
        )
    if suffix not in KINDS:
        raise CorpusError(
            f"the corpus {path} ends in {path.suffix!r}, expected one of {', '.join(KINDS)}, all but the last also with .gz; "
            "convert or rename it."
        )
    if path.stat().st_size == 0:
        raise CorpusError(f"the corpus {path} is empty, expected at least one row; check the file.")
    return suffix


def files_of(folder: File, split: str, *, is_asked: bool) -> tuple[list[File], str]:
    """Return the files of a folder, at any depth, that are read as one corpus, and in words which they are.

    Args:
        folder: of files of one kind; where names of files or folders tell splits, those of one split are taken.
        split: to take.
        is_asked: whether a folder without splits is refused.

    Raises:
        CorpusError: there are none, they are of several kinds, or none is of the split.
    """
    files = _found(folder) if isinstance(folder, Path) else _found_at(folder)
    kinds = sorted({_suffix(path) for path in files})
    if not files:
        raise CorpusError(
            f"the folder {folder} holds no {', '.join(KINDS)} file, expected at least one; check the path."
        )
    if len(kinds) > 1:
        raise CorpusError(
            f"the folder {folder} holds files of several kinds ({', '.join(kinds)}), expected one; name a file."
        )
    splits = {path: _splits_of(path.relative_to(folder)) for path in files}
    known = sorted(set().union(*splits.values()))
    if len(known) < 2 and not is_asked:
        return files, counted(len(files), "file")
    named = re.compile(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])")
    wanted = _SPLITS.get(split.lower())
    chosen = [
        path
        for path in files
        if (wanted in splits[path] if wanted else named.search(str(path.relative_to(folder)).lower()))
    ]
    if not chosen:
        has = f"files of the splits {', '.join(known)}" if known else "no files of splits"
        raise CorpusError(f"the folder {folder} has {has} and none of {split}; name another one in split, or a file.")
    return chosen, f"{len(chosen)} of {counted(len(files), 'file')}, of the split {split}"


def _found(folder: Path) -> list[Path]:
    """Return every file below a folder that is named as a corpus; what begins with a dot is of programs, not of people."""
    found: list[Path] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(at)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith((".", "__")))
        if real not in seen:
            found += [Path(at, name) for name in names if not name.startswith(".") and name not in _OF_HUBS]
        seen.add(real)
    return sorted(path for path in found if _suffix(path) in (*KINDS, *_PACKED))


def _found_at(folder: RemoteFile) -> list[RemoteFile]:
    """Return the same of a folder at an address."""

    def counts(path: PurePath) -> bool:
        return not any(part.startswith((".", "__")) for part in path.parts) and path.name not in _OF_HUBS

    return [path for path in folder.files() if counts(path.relative_to(folder)) and _suffix(path) in (*KINDS, *_PACKED)]


def _splits_of(path: PurePath) -> set[str]:
    """Return the splits that the name of a file tells, or else that of the nearest folder around it."""
    for part in reversed(path.parts):
        found = {_SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLITS}
        if found:
            return found
    return set()


def _suffix(path: AnyFile) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix
