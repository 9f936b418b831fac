"""WikiText: plain text by paragraph, cut in two."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command

CONFIGS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1", "wikitext-2-v1", "wikitext-103-v1")


def reject(text: str) -> str | None:
    """Return why a row is left out: headings, such as `= Title =`, are rows of their own."""
    return "heading" if text.startswith("= ") and text.endswith(" =") else None


def corpus(config: str) -> Corpus:
    """Return the corpus of one configuration."""
    return Corpus(
        name=config,
        title="WikiText",
        hub_id="Salesforce/wikitext",
        config=config,
        prompt="the first part of the paragraph; headings are dropped",
        completion="the rest of it",
        columns=("text",),
        reject=reject,
    )


main = command(*map(corpus, CONFIGS))

if __name__ == "__main__":
    main()
