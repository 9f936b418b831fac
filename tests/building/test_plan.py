"""What a build needs is said before it takes it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from builds import LANGUAGE_MODEL_STAGE, StopAt

from coreinfer_sim.base.errors import BuildError, ClusteringError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import BuildConfig


def test_more_clusters_than_prompts_is_said_before_anything_is_computed(build, tmp_path):
    stages = []

    class Stages(Progress):
        def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
            stages.append(stage)

    with pytest.raises(ClusteringError, match="61 clusters were asked for, but the corpus holds 60 prompts"):
        build(tmp_path / "index", BuildConfig(clusters=61), progress=Stages())
    assert stages == ["Reading the corpus"]
    assert not (tmp_path / "index.build").exists()  # or it would stand in the way of the right number


def test_a_disk_that_is_too_small_is_refused_beforehand(build, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BuildError, match=r"1000 B are free beside .*index, expected \d+\.\d KiB; free some space"):
        build(tmp_path / "index")


def test_what_a_build_has_written_is_not_asked_of_the_disk_again(build, tmp_path, monkeypatch):
    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(out, progress=StopAt(LANGUAGE_MODEL_STAGE, end=True))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))

    def wanted(out: Path) -> float:
        with pytest.raises(BuildError, match="0 B are free") as refused:
            build(out)
        return float(re.search(r"expected ([\d.]+) KiB", str(refused.value))[1])

    written = sum(path.stat().st_size for path in (tmp_path / "index.build" / "shards").iterdir()) / 1024
    assert wanted(tmp_path / "other") - wanted(out) == pytest.approx(written, abs=0.2)


def test_a_build_with_auto_clusters_looks_at_the_disk_once_they_are_chosen(build, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BuildError, match="1000 B are free beside"):
        build(tmp_path / "index", BuildConfig())
