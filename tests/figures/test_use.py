"""What the figures of use count: sentences, and the texts of the help."""

from __future__ import annotations

from figures.use import help_texts, long_sentences, prose, sentences, words

PAGE = """# A heading of seven words, not counted

A first sentence, with `code of several words`. A second one
goes on in the next line, with a [link to a page](page.md).

    coreinfer-sim is.not a sentence

- An item without an end
- 214 types: a list, e. g. this

| a | table |
|---|---|

```python
x = 1.  # no sentence
```
"""


def test_sentences_of_a_page():
    assert sentences(prose(PAGE)) == [
        "A first sentence, with code.",
        "A second one goes on in the next line, with a link to a page.",
        "- An item without an end",
        "214 types: a list, e.",
        "g.",
        "this",
    ]
    assert words("A – b: c.") == 3


def test_long_ones_are_listed():
    (found,) = long_sentences(iter([("page", "One two three. One two.")]), most=2)
    assert found == (3, "page", "One two three.")


def test_every_text_of_the_help_is_looked_at():
    texts = dict(help_texts())
    assert {"coreinfer-sim", "coreinfer-sim run", "coreinfer-sim config set", "coreinfer-sim run --read-ratio"} <= {
        *texts
    }
    assert "default" not in texts["coreinfer-sim run --read-ratio"] and "coreinfer-sim run --keep-ratio" not in texts
