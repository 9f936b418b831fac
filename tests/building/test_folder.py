"""The folder of an index is replaced on demand alone, and a build's is held by one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest
from builds import LANGUAGE_MODEL_STAGE, StopAt, assert_nothing_loads, contents

from coreinfer_sim.base.errors import BuildError, ClusteringError, CorpusError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.index.index import SemanticIndex


def test_an_index_that_exists_is_not_replaced(build, built, tmp_path):
    out = shutil.copytree(built, tmp_path / "index")
    with pytest.raises(BuildError, match=r"index exists already, expected a new or an empty folder; .*with force"):
        build(out, BuildConfig(clusters=2))
    assert contents(out) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_force_replaces_an_index(build, built, tmp_path):
    out = tmp_path / "index"
    assert len(build(out, BuildConfig(clusters=2))) == 2
    assert len(build(out, force=True)) == 3
    assert contents(out) == contents(built)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_force_keeps_the_old_index_until_the_new_one_is_there(build, built, tmp_path):
    out = shutil.copytree(built, tmp_path / "index")
    with pytest.raises(KeyboardInterrupt):
        build(out, BuildConfig(clusters=2), force=True, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    assert contents(out) == contents(built)
    assert len(SemanticIndex.load(out)) == 3


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_index_is_never_replaced(build, tmp_path, force):
    out = tmp_path / "home"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(BuildError, match="home exists"):
        build(out, force=force)
    assert (out / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"source": "/nowhere/corpus.jsonl"}, CorpusError),
        ({"config": BuildConfig(clusters=61)}, ClusteringError),
    ],
)
def test_a_build_that_cannot_start_leaves_nothing_that_loads(build, tmp_path, settings, error):
    with pytest.raises(error):
        build(tmp_path / "index", **settings)
    assert not (tmp_path / "index").exists()
    assert_nothing_loads(tmp_path)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a build folder, as a build at work does."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        yield


@pytest.mark.parametrize("force", [False, True])
def test_a_second_build_in_the_same_folder_is_refused(build, built, tmp_path, force):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    with held(tmp_path / "index.build"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BuildError, match=r"another build is at work in .*index\.build"):
            build(out, model="nowhere", force=force)  # before a model is loaded
        assert sorted(tmp_path.rglob("*")) == before
    build(out)
    assert contents(out) == contents(built)


def test_a_build_holds_its_folder_while_it_runs(build, tmp_path):
    class Second(Progress):
        def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
            with pytest.raises(BuildError, match="another build is at work"):
                build(tmp_path / "index")
            tried.append(stage)

    tried: list[str] = []
    build(tmp_path / "index", progress=Second())
    assert {"Reading the corpus", "Embedding", LANGUAGE_MODEL_STAGE} <= set(tried)


def test_an_empty_folder_is_taken_as_it_is(build, built, tmp_path):
    out = tmp_path / "index"
    out.mkdir()
    number = out.stat().st_ino
    build(out)
    assert contents(out) == contents(built) and out.stat().st_ino == number
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("there", [True, False], ids=["an index", "nothing"])
def test_an_index_is_made_where_a_link_points(build, built, tmp_path, there):
    (tmp_path / "far").mkdir()
    out, link = tmp_path / "far" / "index", tmp_path / "link"
    link.symlink_to(out, target_is_directory=True)
    if there:
        build(link, BuildConfig(clusters=2))
        with pytest.raises(BuildError, match="exists already"):
            build(link)
        with pytest.raises(KeyboardInterrupt):
            build(link, force=True, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
        assert len(SemanticIndex.load(link)) == 2
    build(link, force=there)
    assert link.is_symlink() and contents(out) == contents(built)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != out) == ["far", "index", "link"]


def test_an_index_that_lost_its_manifest_is_replaced_by_force(build, built, tmp_path):
    out = shutil.copytree(built, tmp_path / "index")
    (out / "manifest.json").unlink()
    with pytest.raises(BuildError, match="exists already"):
        build(out)
    build(out, force=True)
    assert contents(out) == contents(built)


@pytest.mark.parametrize("name", ["a b", "ü%20#[1]", "-x", "a\nb", "'\"$"])
def test_an_index_may_have_any_name(build, tmp_path, name):
    (tmp_path / name).mkdir()
    out = tmp_path / name / name
    assert len(build(out)) == len(build(out, force=True)) == len(SemanticIndex.load(out)) == 3
