"""XSum: article to one-sentence summary."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command

main = command(
    Corpus(
        name="xsum",
        title="XSum",
        hub_id="EdinburghNLP/xsum",
        prompt="the article",
        completion="the one-sentence summary",
        columns=("document", "summary"),
        id_column="id",
    )
)

if __name__ == "__main__":
    main()
