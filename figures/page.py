"""The server's page in a real browser: what it loads and says, how it draws, and its pictures for the documents."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from figures.engines import server
from figures.record import at_most, exactly, record
from figures.table import DEMO_INDEX, DEMO_MODEL, REQUIRED, ROOT, Given, figure

FILE = "figures-findings.json"
_CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_NEEDS = "an index with a map, Chromium, playwright"
_DESK, _PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
_QUESTION = "How do stars form, and what are they made of?"
_TURNS = ("How do stars form?", "Which planet has the most moons?", "What should I plant in spring?")
_FRAME_MS = 1000 / 60


@contextmanager
def browser() -> Iterator[Any]:
    """Run Chromium."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise click.ClickException("there is no Chromium; install it from the system's packages.")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=list(_CHROMIUM))
        yield chromium
        chromium.close()


@contextmanager
def _visit(chromium: Any, url: str, kept: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """Open the page in a context of its own, with settings that it keeps; ``errors`` and ``elsewhere`` list what went wrong."""
    context = chromium.new_context(**options)
    name, settings = "coreinfer-settings", json.dumps(json.dumps({"tokens": 160, **(kept or {})}))
    context.add_init_script(f"localStorage.getItem('{name}') || localStorage.setItem('{name}', {settings})")
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.errors, page.elsewhere = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: said.type in ("error", "warning") and page.errors.append(said.text))
    page.on("request", lambda sent: sent.url.startswith((url, "data:", "blob:")) or page.elsewhere.append(sent.url))
    page.goto(url)
    _until(page, "document.getElementById('model').textContent !== ''")
    yield page
    context.close()


def _ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    done = "document.querySelector('.turn:last-child .answer .tools') && document.getElementById('stop').hidden"
    _until(page, done)


def _until(page: Any, expression: str) -> None:
    """Wait until an expression is true; Playwright's own way to do so is one that the page's policy forbids."""
    end = time.monotonic() + 300
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise click.ClickException(f"the page did not come to this in 300 s: {expression}")
        page.wait_for_timeout(50)


def found_by_axe(chromium: Any, url: str) -> tuple[list[str], list[str], list[list[Any]]]:
    """Return a document's errors in the console, its requests to elsewhere, and what axe-core finds, in two schemes and sizes."""
    from axe_playwright_python.sync_playwright import Axe

    errors: list[str] = []
    elsewhere: list[str] = []
    violations: list[list[Any]] = []
    for scheme in ("light", "dark"):
        for size in (_DESK, _PHONE):
            context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda said: said.type in ("error", "warning") and errors.append(said.text))
            page.on("request", lambda sent: sent.url.startswith((url, "data:", "blob:")) or elsewhere.append(sent.url))
            page.goto(url)
            found = Axe().run(page).response["violations"]
            violations += [[each["id"], each["impact"], scheme, size["width"]] for each in found]
            context.close()
    return errors, elsewhere, violations


@figure(
    FILE, f"{_NEEDS}, axe-playwright-python", "2 minutes", timed=True, model=DEMO_MODEL, name=None, index=DEMO_INDEX
)
def checks(given: Given) -> None:
    """What the page loads, how soon it shows, and whether anything is wrong with it, in a conversation with a real model."""
    from axe_playwright_python.sync_playwright import Axe

    from coreinfer_sim.serving.static import sent_bytes

    wrong: dict[str, list[Any]] = {"errors": [], "elsewhere": [], "axe": []}
    with server(given) as (url, _pid), browser() as chromium:
        for scheme in ("light", "dark"):
            for size in (_DESK, _PHONE):
                options = {"viewport": size, "color_scheme": scheme, "reduced_motion": "reduce"}
                with _visit(chromium, url, {"compare": True}, **options) as page:
                    _ask(page, _QUESTION)
                    found = Axe().run(page).response["violations"]
                    wrong["axe"] += [[each["id"], each["impact"], scheme, size["width"]] for each in found]
                    wrong["errors"] += page.errors
                    wrong["elsewhere"] += page.elsewhere
                    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
                    sent = page.evaluate(
                        "performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))"
                        ".filter(each => !each.name.includes('/api/') && !each.name.includes('/v1/'))"
                        ".reduce((sum, each) => sum + each.transferSize, 0)"
                    )
    record("page: errors in the console", len(wrong["errors"]), "errors", exactly(0), which=wrong["errors"])
    record(
        "page: requests that leave the machine",
        len(wrong["elsewhere"]),
        "requests",
        exactly(0),
        which=wrong["elsewhere"],
    )
    what = "light and dark, desk and phone, a conversation that compares"
    record(f"page: what axe-core finds, {what}", len(wrong["axe"]), "violations", exactly(0), which=wrong["axe"])
    record("page: first contentful paint, the last of four visits", paint / 1000, "s", at_most(1))
    record("page: what a visit loads of it, a conversation without formulas", sent / 1000, "kB", at_most(600))
    record(
        "page: all that can be loaded of it, every font included", sent_bytes() / 1000, "kB, compressed", at_most(600)
    )


@figure(FILE, "Chromium, playwright", "1 minute", timed=True)
@click.option("--rate", default=200, help="Tokens a second.")
@click.option("--seconds", default=15)
def frames(_given: Given, rate: int, seconds: int) -> None:
    """Frames that the page drops while an answer streams: the guide's own Markdown, replayed as tokens of four characters."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "guide").glob("*.md")))
    pieces = [source[n : n + 4] for n in range(0, 4 * rate * seconds, 4)]
    pieces = [piece for piece in pieces if piece]
    with _replayed(pieces, rate) as url, browser() as chromium, _visit(chromium, url, viewport=_DESK) as page:
        page.evaluate(
            "() => { window.frames_ = []; let last = performance.now();"
            "const next = now => { window.frames_.push(now - last); last = now; requestAnimationFrame(next); };"
            "requestAnimationFrame(next); }"
        )
        _ask(page, _QUESTION)
        found = page.evaluate("window.frames_")
        length = page.evaluate("document.querySelector('.answer .prose').textContent.length")
    dropped = sum(max(0, round(each / _FRAME_MS) - 1) for each in found)
    title = f"page: frames dropped while {len(pieces)} tokens stream at {rate} a second"
    unit = f"of {len(found) + dropped} frames; the longest took {max(found):.0f} ms"
    record(title, dropped, unit, exactly(0), characters=length)


@contextmanager
def _replayed(pieces: list[str], rate: int) -> Iterator[str]:
    """Serve the page's own files, and in place of a model a stream that was recorded."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    from coreinfer_sim.serving.static import add_page

    app = FastAPI()
    add_page(app)
    facts = {"modes": ["dense"], "profile": None, "clusters": 0, "chat": True, "map": False, "neurons": False}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"needs_key": False}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "recorded", "coreinfer": facts}]}

    @app.post("/api/lookup")
    async def lookup() -> dict[str, Any]:
        match = {"cluster": 0, "label": "recorded", "similarity": 1.0, "confidence": 1.0, "confident": True}
        return {"text": _QUESTION, "matches": [match], "place": None}

    @app.post("/v1/chat/completions")
    async def answer() -> StreamingResponse:
        async def events() -> Any:
            began = time.perf_counter()
            for number, piece in enumerate(pieces):
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                choice = {"delta": {"content": piece}, "finish_reason": None}
                yield f"data: {json.dumps({'id': 'recorded', 'choices': [choice]})}\n\n"
            end: dict[str, Any] = {"id": "recorded", "choices": [{"delta": {}, "finish_reason": "stop"}]}
            end |= {"coreinfer": {"mode": "dense", "cluster": None}, "usage": {"completion_tokens": len(pieces)}}
            yield f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    served.should_exit = True
    thread.join(20)


@figure("docs/images", _NEEDS, "3 minutes", model=DEMO_MODEL, name=None, index=REQUIRED, out=ROOT / "docs" / "images")
def pictures(given: Given) -> None:
    """Take the pictures of the page that the README and the guide show; it measures nothing."""
    with server(given, "--name", given.name, "--read-ratio", "0.6") as (url, _pid), browser() as chromium:
        for name, kept, asked in (
            ("page", {"tokens": 72}, _TURNS),
            ("page-compare", {"compare": True, "tokens": 96}, (_QUESTION,)),
        ):
            with _visit(chromium, url, kept, viewport=_DESK, color_scheme="light") as page:
                for text in asked:
                    _ask(page, text)
                page.wait_for_timeout(800)  # until the prompt has dropped onto the map
                _take(page, given.out / f"{name}.webp")


def _take(page: Any, path: Path) -> None:
    """Write a picture of what is seen, as WebP, which Playwright itself does not write."""
    session = page.context.new_cdp_session(page)
    taken = session.send("Page.captureScreenshot", {"format": "webp", "quality": 82})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(taken["data"]))
    print(path.name, path.stat().st_size, flush=True)
