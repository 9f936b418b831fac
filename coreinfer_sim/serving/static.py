"""The page's files: read once, sent compressed where that is understood, under a policy that lets nothing else run."""

from __future__ import annotations

import functools
import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

PAGE = Path(__file__).parent / "page"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
"""No script within the page, none from elsewhere, none made of a text; requests go to this server alone."""
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
_PACKED = ".woff2"
"""Is compressed already."""


class _File(NamedTuple):
    content: bytes
    compressed: bytes | None
    kind: str
    tag: str


def add_page(app: FastAPI) -> None:
    """Serve the page at / and its files below /page."""

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _response(request, "index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        return _response(request, name)


def _response(request: Request, name: str) -> Response:
    found = _file(name) if name in _names() else None
    if found is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "ETag": found.tag, "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    content = found.content
    if found.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["Content-Encoding"] = found.compressed, "gzip"
    return Response(content, headers=headers, media_type=found.kind)


def sent_bytes() -> int:
    """Return the bytes of all files as they are sent to who understands compression."""
    return sum(len(found.compressed or found.content) for found in map(_file, _names()))


@functools.cache
def _names() -> frozenset[str]:
    """Return the names of all files, so that a request can name no other."""
    return frozenset(path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.suffix in _TYPES)


@functools.cache
def _file(name: str) -> _File:
    path = PAGE / name
    content = path.read_bytes()
    compressed = None if path.suffix == _PACKED else gzip.compress(content, mtime=0)
    return _File(content, compressed, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
