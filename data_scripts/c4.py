"""C4 (en): plain text, cut in two."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command

main = command(
    Corpus(
        name="c4",
        title="C4 (en)",
        hub_id="allenai/c4",
        config="en",
        prompt="the first part of the page",
        completion="the rest of it",
        columns=("text",),
        streaming=True,
    )
)

if __name__ == "__main__":
    main()
