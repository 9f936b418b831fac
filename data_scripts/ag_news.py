"""AG News: plain text, cut in two."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command

main = command(
    Corpus(
        name="ag_news",
        title="AG News",
        hub_id="fancyzhx/ag_news",
        prompt="the first part of the news item",
        completion="the rest of it; the label is not used",
        columns=("text",),
    )
)

if __name__ == "__main__":
    main()
