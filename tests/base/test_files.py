"""What is written takes the place of what was there in one step, wherever that really is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.files import check_folder, is_vacant, replacing, restore, write_json

ODD_NAMES = ["a b", "ü%20", "#[1]", "-x", "a\nb", "'\"$", "…", "x.tar.gz"]


def made(path: Path, content: str = "new") -> None:
    """Make a folder of two files."""
    path.mkdir()
    (path / "last").write_text(content)
    (path / "first").write_text(content)


def read(path: Path) -> dict[str, str]:
    return {each.name: each.read_text() for each in path.iterdir()}


NEW, OLD = ({name: text for name in ("first", "last")} for text in ("new", "old"))


@pytest.fixture(params=["nothing", "an empty folder", "a folder", "a link to a folder", "a link to nothing"])
def place(request, tmp_path) -> Path:
    """A place where a folder can be put; what is there really is the second file or folder of its name."""
    path, elsewhere = tmp_path / "here" / "index", tmp_path / "far" / "other"
    path.parent.mkdir()
    elsewhere.parent.mkdir()
    if "link" in request.param:
        path.symlink_to(elsewhere, target_is_directory=True)
    if request.param.endswith("a folder"):
        made(Path(os.path.realpath(path)), "old")
    if "empty" in request.param:
        path.mkdir()
    return path


def test_a_folder_is_replaced_where_it_really_is(place, tmp_path):
    was_link, real = place.is_symlink(), Path(os.path.realpath(place))
    with replacing(place, "last") as part:
        made(part)
        assert not real.exists() or is_vacant(real) or read(real) == OLD
    assert read(place) == read(real) == NEW
    assert place.is_symlink() == was_link
    assert [path for path in tmp_path.rglob(".*")] == []


@pytest.mark.parametrize("n_moves", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_where_the_new_cannot_be_put(place, tmp_path, monkeypatch, n_moves, error):
    before = read(place) if place.exists() else None
    moves = []
    replace = os.replace

    def failing(source, target):
        moves.append(target)
        if len(moves) == n_moves:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    if before == OLD:
        with pytest.raises(error), replacing(place, "last") as part:
            made(part)
        assert read(place) == OLD
    with pytest.raises(ZeroDivisionError), replacing(place, "last") as part:
        made(part)
        raise ZeroDivisionError
    assert (read(place) if place.exists() else None) == before
    assert [path for path in tmp_path.rglob(".*")] == []


def test_a_mount_point_is_filled_anew_and_gets_back_what_it_held(tmp_path, monkeypatch):
    place = tmp_path / "index"
    made(place, "old")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)
    number = place.stat().st_ino
    move = shutil.move
    monkeypatch.setattr(shutil, "move", lambda source, target: 1 / 0 if "part" in str(source) else move(source, target))
    with pytest.raises(ZeroDivisionError), replacing(place, "last") as part:
        made(part)
    assert read(place) == OLD
    monkeypatch.setattr(shutil, "move", move)
    with replacing(place, "last") as part:
        made(part)
    assert read(place) == NEW and place.stat().st_ino == number
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_kill_between_two_moves_is_mended_by_the_next_call(tmp_path):
    place = tmp_path / "index"
    made(tmp_path / ".index.replaced", "old")
    restore(place)
    assert read(place) == OLD and [path.name for path in tmp_path.iterdir()] == ["index"]
    made(tmp_path / ".index.replaced", "older")
    restore(place)
    assert read(place) == OLD and [path.name for path in tmp_path.iterdir()] == ["index"]


def test_files_are_replaced_where_they_really_are(tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "file", tmp_path / "link"
    link.symlink_to(real)
    for content in ("old", "new"):
        with replacing(link) as part:
            part.write_text(content)
        assert real.read_text() == content and link.is_symlink()
    write_json(link, {"a": 1})
    assert json.loads(real.read_text()) == {"a": 1} and link.is_symlink()
    made(tmp_path / "folder", "old")
    with replacing(tmp_path / "folder") as part:
        part.write_text("a file in its place")
    assert (tmp_path / "folder").read_text() == "a file in its place"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_will_do(tmp_path, name):
    with replacing(tmp_path / name, "last") as part:
        made(part)
    write_json(tmp_path / name / "file", {"a": name})
    assert json.loads((tmp_path / name / "file").read_text(encoding="utf-8")) == {"a": name}
    check_folder(tmp_path / name / name)


def test_a_name_that_is_no_text_survives_json(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "file", {"name": name})
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == {"name": name}


def test_a_device_takes_what_it_gets(tmp_path):
    if not Path(os.devnull).exists():
        pytest.skip("there is no device with a path")
    check_folder(Path(os.devnull))
    write_json(Path(os.devnull), {"a": 1})
    assert not Path(os.devnull).is_file()


def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no folder .*none for file; make it first"):
        check_folder(tmp_path / "none" / "file")

    def refused(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ConfigError, match=r"^file cannot be written into .* \(Read-only file system\), expected "):
        check_folder(tmp_path / "file")
