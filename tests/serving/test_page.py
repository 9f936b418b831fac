"""The page works in a real browser, and nothing that a stranger wrote does; skipped where Chromium is not installed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from served import NAME, Served, backend_of
from tiny_index import WIDE_RATIO, build_rows

from coreinfer_sim.base.settings import BuildConfig
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.serving.app import make_app

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "How do stars form? <img src=x onerror=pwned=1>",
    "Why does bread rise? <script>pwned=1</script>",
    "What do judges decide? [here](javascript:pwned=1) \x1b[2J\x1b]0;pwned\x07",
]
"""Prompts of the index's corpus."""
ANSWER = (
    r"""# Title

<script>window.pwned = 1</script> and <img src="x" onerror="window.pwned=1"> and <svg onload="pwned=1"></svg>

[script](javascript:window.pwned=1), [data](data:text/html,<script>pwned=1</script>), [vb](vbscript:x), [site](https://example.com/a),
![picture](https://example.com/pixel.png) <javascript:pwned=1> <a href="//example.com" onclick="pwned=1">raw</a>

Inline $a^2 + b^2 = c^2$ and \(x_1\), prices of $5 and $6, and

$$\int_0^1 x\,dx = \frac{1}{2}$$

\[\href{javascript:window.pwned=1}{x} \includegraphics{https://example.com/pixel.png} \htmlData{a=b}{y}\]

$$\def\a#1{#1#1#1#1#1#1#1#1}\a{\a{\a{\a{\a{\a{\a{x}}}}}}}$$

$$\def\x{\x\x}\x$$

| a | b |
|---|---|
| 1 | <b onmouseover="pwned=1">2</b> |

```python
print("<script>pwned=1</script>")
```

Escapes: """
    + "\x1b[31mred\x1b[0m \x1b]8;;javascript:pwned=1\x07link\x1b]8;;\x07"
)
DAMAGED = {"turns": [{"asked": "How?", "ours": {"text": "So.", "facts": {"speed": "fast", "megabytes": "many"}}}]}
ALIKE = {"ours": {"text": "Stars form in cold clouds of gas."}, "dense": {"text": "Stars form in large clouds of gas."}}


@pytest.fixture(scope="module")
def index(wide_checkpoint, encoder, tmp_path_factory):
    rows = [{"prompt": f"{question} {number}"} for question in HOSTILE for number in range(3)]
    config = BuildConfig(clusters=3, gamma=WIDE_RATIO)
    folder = build_rows(wide_checkpoint, tmp_path_factory.mktemp("hostile"), config, encoder, rows)
    return SemanticIndex.load(folder, encoder)


@pytest.fixture(scope="module")
def backend(language_model, index):
    return backend_of(language_model, index)


@pytest.fixture(scope="module")
def url(backend):
    with Served(make_app(backend, NAME)) as server:
        yield server.url


class Visit:
    """A page in a context of its own, and what went wrong there."""

    def __init__(self, browser, url, settings=None, **options):
        self.errors, self.elsewhere, self.url = [], [], url
        self.context = browser.new_context(**options)
        kept = json.dumps({"tokens": 12, **(settings or {})})
        self.context.add_init_script(
            f"localStorage.getItem('coreinfer-settings') || localStorage.setItem('coreinfer-settings', {kept!r})"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.errors.append(said.text))
        self.page.on(
            "request", lambda sent: sent.url.startswith((url, "data:", "blob:")) or self.elsewhere.append(sent.url)
        )
        self.page.goto(url)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            assert self.errors == [] and self.elsewhere == []
            assert self.page.evaluate("typeof pwned") == "undefined"
        self.context.close()

    def until(self, expression):
        """Wait until an expression is true; Playwright's own way to do so is one that the page's policy forbids."""
        end = time.monotonic() + 30
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def connected(self):
        self.until("document.getElementById('model').textContent !== ''")
        return self

    def ask(self, text):
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        self.answered()

    def answered(self):
        self.until("document.querySelector('.answer .tools') && !document.getElementById('send').hidden")

    def text(self, selector):
        return self.page.locator(selector).last.inner_text()

    def load(self, turns, name="conversations.json"):
        content = {
            "kind": "coreinfer_sim conversations",
            "version": 1,
            "conversations": [{"changed": 1, "turns": turns}],
        }
        self.page.set_input_files(
            "#file", {"name": name, "mimeType": "application/json", "buffer": json.dumps(content).encode()}
        )


def test_a_conversation_is_asked_changed_and_kept(browser, url):
    with Visit(browser, url) as visit:
        visit.connected().ask("How do stars form?")
        page = visit.page
        assert re.search(r"tokens/s.*to the first token.*12 tokens", visit.text(".answer .facts").replace("\n", " "))
        assert page.locator("#why li").count() == 3 and "topic" in visit.text("#why-sentence")
        assert "Token 12 read 33 %" in visit.text("#neurons-sentence")  # the neurons that are held
        assert page.locator("#near-list li").count() == 5
        visit.ask("And why does bread rise?")
        assert page.locator(".turn").count() == 2
        # once more, and changed
        first = visit.text(".answer .prose")
        page.locator("button", has_text="Regenerate").last.click()
        visit.answered()
        assert page.locator(".turn").count() == 2 and visit.text(".answer .prose") == first  # greedy
        page.press("#prompt", "ArrowUp")
        page.locator(".editing textarea").fill("What do judges decide?")
        page.keyboard.press("Enter")
        visit.until("document.querySelectorAll('.asked')[1].textContent.includes('judges')")
        visit.answered()
        # kept, and removed
        page.reload()
        visit.connected()
        assert page.locator(".turn").count() == 2 and "judges" in visit.text(".asked")
        assert "How do stars form?" in visit.text("#conversations li.current")
        page.once("dialog", lambda asked: asked.accept())
        page.locator("#conversations .remove").first.click()
        page.wait_for_selector(".empty")
        assert page.locator(".turn").count() == 0


def test_an_answer_can_be_stopped(browser, url):
    with Visit(browser, url, {"tokens": 1000}) as visit:
        visit.connected()
        visit.page.fill("#prompt", "How do stars form?")
        visit.page.press("#prompt", "Enter")
        visit.until("document.querySelector('.answer .facts')?.textContent.includes('tokens/s')")
        visit.page.keyboard.press("Escape")
        visit.answered()
        assert "stopped" in visit.text(".answer .facts") and visit.text(".answer .prose")


def test_two_answers_side_by_side_and_their_words(browser, url):
    with Visit(browser, url, {"compare": True}) as visit:
        visit.connected().ask("How do stars form?")
        assert visit.page.locator(".answers.two .answer").count() == 2
        facts = visit.page.locator(".answer .facts").all_inner_texts()
        assert "topic" in facts[0] and "topic" not in facts[1]
        visit.load([{"asked": "How?", **ALIKE}])
        visit.page.wait_for_selector(".answers.two mark")
        assert visit.page.locator(".ours mark").all_inner_texts() == ["cold"]
        assert visit.page.locator(".dense mark").all_inner_texts() == ["large"]


def test_conversations_leave_and_come_back(browser, url):
    with Visit(browser, url) as visit:
        visit.connected().load([{"asked": "How?", **ALIKE}])
        visit.page.wait_for_selector(".turn")
        with visit.page.expect_download() as download:
            visit.page.click("#export")
        content = json.loads(download.value.path().read_text(encoding="utf-8"))
        (one,) = content["conversations"]
        assert one["turns"][0]["asked"] == "How?" and one["turns"][0]["dense"]["text"] == ALIKE["dense"]["text"]
        for buffer, expected in (
            (b"{", "is no JSON"),
            (b"[1]", "holds no conversations"),
            (json.dumps({**content, "version": 9}).encode(), "has version 9, expected 1"),
            (
                json.dumps({**content, "conversations": [{"turns": [{"asked": 3}]}]}).encode(),
                "Conversation 1 of a.json is damaged",
            ),
            (
                json.dumps({**content, "conversations": [DAMAGED]}).encode(),
                "Conversation 1 of a.json is damaged",
            ),
            (json.dumps({**content, "conversations": [{"turns": []}]}).encode(), "holds no conversations"),
        ):
            visit.page.set_input_files("#file", {"name": "a.json", "mimeType": "application/json", "buffer": buffer})
            visit.until(f"document.getElementById('error').textContent.includes({expected!r})")
        assert visit.page.locator("#conversations li").count() == 1


def test_tabs_keep_each_other_s_conversations(browser, url):
    with Visit(browser, url) as visit:
        visit.connected().ask("How do stars form?")
        first = visit.page
        other = visit.context.new_page()
        other.goto(url)
        visit.page = other
        visit.connected()
        assert "stars" in visit.text(".asked")  # which the first tab has kept
        other.click("#new")
        visit.ask("Why does bread rise?")
        visit.page = first
        visit.until("document.querySelectorAll('#conversations li').length === 2")
        assert "stars" in visit.text(".asked")  # what is looked at stays
        visit.ask("And how do they end?")
        # both change the same conversation: none is lost
        visit.page = other
        other.locator("#conversations .open", has_text="stars").click()
        assert other.locator(".turn").count() == 2
        other.fill("#prompt", "What do judges decide?")
        first.fill("#prompt", "And what are they made of?")
        other.press("#prompt", "Enter")
        first.press("#prompt", "Enter")
        for visit.page in (other, first):
            visit.answered()
        first.reload()
        visit.connected()
        kept = "".join(json.dumps(each) for each in first.evaluate("Object.values(localStorage)"))
        for asked in ("stars form", "bread rise", "they end", "judges decide", "made of"):
            assert asked in kept, asked


def test_conversations_of_an_earlier_release_stay(browser, url):
    earlier = json.dumps([{"id": "a1", "changed": 5, "turns": [{"asked": "How?", **ALIKE}]}])
    with Visit(browser, url) as visit:
        visit.connected().page.evaluate(f"localStorage.setItem('coreinfer-conversations', {json.dumps(earlier)})")
        for _ in range(2):
            visit.page.reload()
            visit.connected()
            assert visit.text("#conversations li.current").startswith("How?")
            assert visit.page.locator("#conversations li").count() == 1


def test_what_has_come_is_kept_when_the_page_is_left(browser, url):
    with Visit(browser, url, {"tokens": 1000}) as visit:
        visit.connected()
        visit.page.fill("#prompt", "How do stars form?")
        visit.page.press("#prompt", "Enter")
        visit.until("document.querySelector('.answer .prose').textContent.length > 40")
        visit.page.reload()
        visit.connected()
        assert len(visit.text(".answer .prose")) > 40 and "stopped" in visit.text(".answer .facts")


def test_what_was_refused_is_not_asked_again(browser, url):
    with Visit(browser, url) as visit:
        visit.connected().ask("word " * 5000)
        assert "shorten the prompt" in visit.text("#error")
        visit.ask("How do stars form?")
        assert visit.text("#error") == "" and visit.text(".answer .prose") != ""
        assert any("400" in each for each in visit.errors)  # of the first one, as a browser tells it
        visit.errors.clear()


def test_texts_of_strangers_are_shown_and_never_executed(browser, url):
    with Visit(browser, url) as visit:
        page = visit.connected().page
        asked = "<script>pwned=1</script> \x1b[2J"
        visit.load([{"asked": asked, "ours": {"text": ANSWER}}])
        page.wait_for_selector(".katex")
        text = page.locator(".answer .prose")
        assert text.locator("script, img, svg[onload], iframe, object, form, style, [onclick], [onerror]").count() == 0
        links = text.locator("a").evaluate_all("each => each.map(one => [one.getAttribute('href'), one.rel])")
        assert {href for href, _ in links} <= {"https://example.com/a", "https://example.com/pixel.png"}
        assert all(rel == "noopener noreferrer" for _, rel in links)
        shown = text.inner_text()
        assert "<script>window.pwned = 1</script>" in shown and "␛[31mred" in shown and "prices of $5 and $6" in shown
        assert visit.text(".asked .said") == "<script>pwned=1</script> ␛[2J"
        # formulas: three are drawn; what they must not do is shown as it was written, and so are bombs
        assert text.locator(".katex").count() >= 3
        assert text.locator(".katex a, .katex img").count() == 0
        assert text.locator(".source").count() >= 1 and "\\def\\x{\\x\\x}" in shown
        assert "".join(text.locator(".block pre").all_inner_texts()).strip() == 'print("<script>pwned=1</script>")'
        assert text.locator("td").last.inner_text() == '<b onmouseover="pwned=1">2</b>'
        # what the corpus holds
        page.locator("#near summary").click()
        near = page.locator("#near-list").inner_text()
        assert (
            "<img src=x onerror=pwned=1>" in near or "<script>pwned=1</script>" in near or "[here](javascript" in near
        )
        page.wait_for_timeout(100)


def test_a_text_that_streams_becomes_what_it_is_as_a_whole(browser, url):
    """Though only its last blocks are read again; the guide has lists, tables and code."""
    guide = "".join(
        (ROOT / "docs" / "guide" / f"{name}.md").read_text(encoding="utf-8") for name in ("build", "measure")
    )
    grown = """async ([text, size]) => {
        const {MarkdownView} = await import("/page/markdown.js");
        const [streamed, whole] = [document.createElement("div"), document.createElement("div")];
        const view = new MarkdownView(streamed);
        for (let end = size; end < text.length + size; end += size) view.show(text.slice(0, end));
        new MarkdownView(whole).show(text);
        const formulas = () => document.querySelector("link[href*=katex]") === null || globalThis.katex;
        while (!formulas()) await new Promise(go => setTimeout(go, 20));
        await new Promise(go => setTimeout(go, 20));
        return [streamed.innerHTML, whole.innerHTML];
    }"""
    with Visit(browser, url) as visit:
        visit.connected()
        for text, size in ((guide, 37), (ANSWER, 3)):
            streamed, whole = visit.page.evaluate(grown, [text, size])
            assert streamed == whole and len(whole) > len(text) / 2


def test_the_map_says_what_is_pointed_at(browser, url, index):
    with Visit(browser, url) as visit:
        visit.connected()
        x, y = (float(each) for each in index.map.coordinates[0])
        box = visit.page.locator("#map").bounding_box()
        visit.page.mouse.move(
            box["x"] + box["width"] / 2 + x * (box["width"] / 2 - 14),
            box["y"] + box["height"] / 2 - y * (min(box["width"], box["height"]) / 2 - 14),
        )
        visit.page.wait_for_selector("#map-tip:not([hidden])")
        # what is drawn with colours of the style sheet gets them as a canvas understands them
        assert visit.page.evaluate("import('/page/dom.js').then(dom => dom.color('--ink'))").startswith("rgb(")
        assert any(text in visit.text("#map-tip") for text in index.map.excerpts)


def test_a_server_without_a_map_shows_the_rest(browser, language_model, wide_index, monkeypatch):
    monkeypatch.setattr(wide_index, "manifest", type(wide_index.manifest)(**{**vars(wide_index.manifest), "map": None}))
    with Served(make_app(backend_of(language_model, wide_index), NAME)) as server, Visit(browser, server.url) as visit:
        visit.connected().ask("How do stars form?")
        assert not visit.page.is_visible("#map-section") and visit.page.locator("#why li").count() == 3
        assert "Token 12 read" in visit.text("#neurons-sentence")


def test_a_key_is_asked_for(browser, backend):
    with Served(make_app(backend, NAME, api_key="secret")) as server, Visit(browser, server.url) as visit:
        page = visit.page
        visit.until("document.getElementById('error').textContent.includes('API key')")
        page.click("#show-settings")
        page.fill("#key", "secret")
        page.locator("#settings button", has_text="Done").click()
        visit.connected().ask("How do stars form?")
        assert visit.text("#error") == "" and visit.text(".answer .prose")


def test_a_base_model_continues_a_text(browser, language_model, index, monkeypatch):
    monkeypatch.setattr(language_model.tokenizer, "chat_template", None)
    with Served(make_app(backend_of(language_model, index), NAME)) as server, Visit(browser, server.url) as visit:
        visit.connected()
        assert "a base model" in visit.text("#model") and visit.page.text_content("#task") == "Text to continue"
        visit.ask("Stars form when")
        assert visit.text(".answer .prose") and visit.page.locator("#why li").count() == 3


def test_neurons_that_come_after_the_answer(browser, url):
    """The topic's neurons may arrive when the answer is over; what its last token read is told all the same."""
    with Visit(browser, url) as visit:
        held = []
        visit.page.route("**/api/topics/*/neurons", lambda route: held.append(route))
        visit.connected()
        visit.page.fill("#prompt", "How do stars form?")
        visit.page.press("#prompt", "Enter")
        visit.until("document.querySelector('.answer .facts')?.textContent.includes('12 tokens')")
        visit.page.wait_for_timeout(1000)  # for the page's last look at what was read
        assert held and "Token" not in visit.text("#neurons-sentence")
        held[0].continue_()
        visit.answered()
        visit.until("document.getElementById('neurons-sentence').textContent.includes('Token 12 read')")


def test_the_field_keeps_the_keyboard(browser, url):
    with Visit(browser, url) as visit:
        visit.connected().ask("How do stars form?")
        focused = "document.activeElement.id === 'prompt'"
        for keys in (("ArrowUp", "Escape"), ("ArrowUp", "Enter")):
            for key in keys:
                visit.page.keyboard.press(key)
            visit.answered()
            visit.until(focused)
        visit.page.locator("button", has_text="Regenerate").last.click()
        visit.answered()
        visit.until(focused)


def test_keys_and_a_phone(browser, url):
    with Visit(browser, url, viewport={"width": 390, "height": 844}, has_touch=True) as visit:
        page = visit.connected().page
        visit.ask("How do stars form?")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not page.is_visible("#insight") and not page.is_visible("#list")
        page.keyboard.press("Alt+i")
        assert page.is_visible("#map")
        visit.until("document.getElementById('neurons-sentence').textContent.includes('Token 12 read')")
        page.keyboard.press("Alt+i")
        page.keyboard.press("Alt+n")
        page.wait_for_selector(".empty")
        page.keyboard.press("?")
        assert page.is_visible("#keys")
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+c")
        assert page.is_checked("#compare")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(browser, url, scheme):
    """axe-core finds nothing, in a conversation with everything, on a desk and on a phone."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for size in ({"width": 1400, "height": 900}, {"width": 390, "height": 844}):
        with Visit(browser, url, viewport=size, color_scheme=scheme, reduced_motion="reduce") as visit:
            visit.connected()
            found = axe.run(visit.page)
            visit.load([{"asked": "How?", **ALIKE}, {"asked": "What?", "ours": {"text": ANSWER}}])
            visit.page.wait_for_selector(".katex")
            for each in (found, axe.run(visit.page)):
                assert [
                    (one["id"], [node["html"][:200] for node in one["nodes"]]) for one in each.response["violations"]
                ] == []
