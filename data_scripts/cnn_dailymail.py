"""CNN/DailyMail 3.0.0: article to highlights."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command

main = command(
    Corpus(
        name="cnn_dailymail",
        title="CNN/DailyMail 3.0.0",
        hub_id="abisee/cnn_dailymail",
        config="3.0.0",
        prompt="the article",
        completion="the highlights, one a line",
        columns=("article", "highlights"),
        id_column="id",
    )
)

if __name__ == "__main__":
    main()
