"""Sharing an index on a hub: the folder that is uploaded, and the way back into the user's indexes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from coreinfer_sim.base.errors import ConfigError, HubError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.files import replacing
from coreinfer_sim.base.hub import no_answer
from coreinfer_sim.base.plots import save_plot
from coreinfer_sim.index.checks import read_manifest, verified_files
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.index.manifest import MANIFEST_FILE
from coreinfer_sim.index.names import indexes_folder, place_of_new
from coreinfer_sim.index.plot import map_chart
from coreinfer_sim.index.storage import write_manifest
from coreinfer_sim.reporting.card import CARD_FILE, PICTURE_FILE, card, without_places

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_repository(repository: str) -> None:
    """Raise ConfigError unless a text is the id of a repository, USER/NAME."""
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{repository!r} is no repository, expected USER/NAME, such as ada/chats.")


def prepare(
    index: SemanticIndex, repository: str, out: Path, licence: str | None = None, commands: Sequence[str] = ()
) -> list[str]:
    """Write what is uploaded of an index: its files, its page, and a picture of its map where it has one.

    The manifest names model, encoder and corpus, and not the folders that they lay in.

    Args:
        index: on disk; its files are checked.
        repository: USER/NAME.
        out: an empty folder.
        licence: see `card`.
        commands: see `card`.

    Returns:
        The names of the files, relative to ``out``.

    Raises:
        IndexFormatError: the index is damaged.
        ConfigError: it has a map, and the extra that draws it is missing.
    """
    manifest = index.manifest
    verified_files(index.folder, manifest, manifest.files.keys())
    for name in manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(index.folder / name, out / name)
    write_manifest(out, without_places(manifest))
    if manifest.map is not None:
        require("the picture of the map", "plots", "altair", "vl_convert")
        save_plot(map_chart(index.map, index.clusters), out / PICTURE_FILE)
    (out / CARD_FILE).write_text(card(index, repository, licence, commands, manifest.map is not None), encoding="utf-8")
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def push(
    index: SemanticIndex,
    repository: str,
    *,
    licence: str | None = None,
    commands: Sequence[str] = (),
    private: bool = False,
) -> str:
    """Upload an index to a hub, as one commit; return its address.

    Args:
        index: on disk.
        repository: USER/NAME; made where there is none.
        licence: see `card`.
        commands: see `card`.
        private: whether a repository that is made is seen by its owner alone.

    Raises:
        HubError: the hub does not answer, or refuses.
        IndexFormatError: see `prepare`.
        ConfigError: the id is none; see `prepare`.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    _check_answer(repository)
    with TemporaryDirectory() as folder, _hub_errors(repository):
        prepare(index, repository, Path(folder), licence, commands)
        hub = HfApi(library_name="coreinfer_sim")
        address = hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise HubError(f"{repository} is there already and public, expected a private one; choose another name.")
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an index of coreinfer_sim")
    return str(address)


def pull(repository: str, out: str | None = None, *, force: bool = False) -> Path:
    """Fetch an index from a hub into the user's indexes; return its folder.

    Only the files that its manifest names are fetched, each is compared with its checksum, and nothing is there before
    all of them are. What was fetched when the connection broke is kept in the hub's cache.

    Args:
        repository: USER/NAME.
        out: a name, or a path with a separator; None: the repository's NAME.
        force: whether an index that is there is replaced.

    Raises:
        HubError: the hub does not answer, or refuses.
        IndexFormatError: what is there is no index, or is damaged.
        ConfigError: the id is none, or an index of that name is there.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    check_repository(repository)
    place = indexes_folder() / repository.rpartition("/")[2] if out is None else place_of_new(out)
    if place.exists() and not force:
        raise ConfigError(f"{place} is there already, expected a new name; name another one, or replace it by force.")
    _check_answer(repository)
    with _hub_errors(repository):
        found = Path(hf_hub_download(repository, MANIFEST_FILE))
    names = [*read_manifest(found.parent).files, MANIFEST_FILE]
    with _hub_errors(repository):
        found = Path(snapshot_download(repository, revision=found.parent.name, allow_patterns=names))
    install(found, place)
    return place


def install(folder: Path, place: Path) -> None:
    """Copy an index that lies in a folder, among other files, to its place, once all of its files are checked.

    Raises:
        IndexFormatError: it is none, or is damaged.
    """
    manifest = read_manifest(folder)
    verified_files(folder, manifest, manifest.files.keys())
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place, MANIFEST_FILE) as part:
        part.mkdir()
        for name in (*manifest.files, MANIFEST_FILE):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, part / name)


def _check_answer(repository: str) -> None:
    """Raise HubError unless the hub answers."""
    if why := no_answer():
        raise HubError(f"{repository} is not to be had, as the hub does not answer ({why}); check the connection.")


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn what the hub's library raises into a sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repository {repository} on the hub, or your token may not see it; check the name, or log in with "
            "'hf auth login'."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repository} has no {MANIFEST_FILE}, expected an index; check the name.") from error
    except LocalTokenNotFoundError as error:
        raise HubError("the hub wants a token, and there is none here; log in with 'hf auth login'.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "log in with 'hf auth login'" if status in (401, 403) else "run the same command again"
        raise HubError(f"the hub refuses {repository} with status {status}; {remedy}.") from error
