"""Take the picture of the server's page that the README shows: python figures/screenshot.py URL OUT.png."""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import sync_playwright

CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def main(url: str, out: str) -> None:
    """Fill in the page, wait for both answers, and take a picture of all of it."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=list(CHROMIUM))
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(url)
        page.click("#send")
        page.wait_for_function("document.getElementById('dense-facts').textContent !== ''", timeout=300_000)
        page.screenshot(path=out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
