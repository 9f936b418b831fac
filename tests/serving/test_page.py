"""The page works in a real browser; skipped where Chromium is not installed."""

from __future__ import annotations

import pytest
from served import NAME, Served, backend_of
from tiny_index import PROMPTS

from coreinfer_sim.serving.app import make_app


@pytest.fixture(scope="module")
def backend(language_model, wide_index):
    return backend_of(language_model, wide_index)


def opened(browser, url):
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    return page, errors


def test_clusters_shares_and_both_answers_are_shown(browser, backend):
    with Served(make_app(backend, NAME, api_key="secret")) as server:
        page, errors = opened(browser, server.url)
        page.fill("#prompt", PROMPTS[1])
        page.fill("#tokens", "6")
        page.click("#send")
        page.wait_for_function("document.getElementById('error').textContent.includes('API key')")
        page.fill("#key", "secret")
        page.click("#send")
        page.wait_for_function("document.getElementById('dense-facts').textContent !== ''", timeout=60_000)
        assert page.locator("#matches tr").count() == 3 and page.locator("#kept div").count() == 3
        assert page.text_content("#error") == "" and errors == []
        assert "similarity, cluster" in page.text_content("#sparse-facts")
        assert "6 tokens" in page.text_content("#dense-facts")
        assert page.locator("#sparse").inner_text() or page.locator("#dense").inner_text()
        page.close()


def test_errors_are_shown(browser, backend):
    with Served(make_app(backend, NAME, max_new_tokens=4)) as server:
        page, errors = opened(browser, server.url)
        page.fill("#prompt", "  ")
        page.click("#send")
        page.wait_for_function("document.getElementById('error').textContent.includes('is empty')")
        page.wait_for_function("document.getElementById('model').textContent.includes('3 clusters')")
        assert errors == [] and page.is_enabled("#send")
        page.close()


def test_a_base_model_continues_a_text(browser, language_model, wide_index, monkeypatch):
    monkeypatch.setattr(language_model.tokenizer, "chat_template", None)
    with Served(make_app(backend_of(language_model, wide_index), NAME)) as server:
        page, errors = opened(browser, server.url)
        page.wait_for_function("document.getElementById('model').textContent.includes('a base model')")
        assert page.text_content("#task") == "Text to continue"
        page.fill("#tokens", "6")
        page.click("#send")
        page.wait_for_function("document.getElementById('dense-facts').textContent !== ''", timeout=60_000)
        assert page.text_content("#error") == "" and errors == []
        assert page.locator("#sparse").inner_text() or page.locator("#dense").inner_text()
        page.close()
