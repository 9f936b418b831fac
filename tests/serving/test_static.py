"""The page's files: what is sent, under which policy, and how much."""

from __future__ import annotations

import re

import httpx
import pytest

from coreinfer_sim.serving.static import PAGE

MOST_BYTES = 600_000
"""That a browser loads of the page in all, if it needs every font."""


def test_every_file_is_sent_under_a_policy_that_lets_nothing_else_run(served):
    for name in (
        "",
        *(f"page/{path.relative_to(PAGE).as_posix()}" for path in PAGE.rglob("*.*") if path.suffix != ".md"),
    ):
        found = httpx.get(f"{served.url}/{name}")
        policy = found.headers["content-security-policy"]
        assert found.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy, name
        assert found.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(f"{served.url}/{name}", headers={"If-None-Match": found.headers["etag"]})
        assert again.status_code == 304 and not again.content


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2fapp.py", "vendor/README.md", "vendor", "%2fetc%2fpasswd", "vendor/../../app.py"]
)
def test_nothing_else_is_sent(served, name):
    assert httpx.get(f"{served.url}/page/{name}").status_code == 404


def test_the_page_is_small_and_names_only_its_own_files(served):
    n_bytes = 0
    with httpx.Client(headers={"Accept-Encoding": "gzip"}) as client:
        for path in PAGE.rglob("*.*"):
            if path.suffix in (".html", ".css", ".js", ".svg", ".woff2"):
                with client.stream("GET", f"{served.url}/page/{path.relative_to(PAGE).as_posix()}") as found:
                    n_bytes += sum(map(len, found.iter_raw()))
    assert n_bytes < MOST_BYTES
    for path in PAGE.glob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|href|from|import|url)\W{1,3}(?:https?:)?//""", text), path.name


def test_every_vendored_file_has_its_licence():
    table = (PAGE / "vendor" / "README.md").read_text(encoding="utf-8")
    for path in (PAGE / "vendor").glob("*.*s"):
        assert f"`{path.name}`" in table
    assert {path.name for path in (PAGE / "vendor").glob("LICENSE-*")} == {
        f"LICENSE-{name}.txt" for name in ("marked", "dompurify", "katex")
    }
