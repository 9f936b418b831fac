"""SQuAD 1.1: paragraph and question to answer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command


def pair(context: str, question: str, answer: str) -> tuple[str, str]:
    """Return the paragraph and the question as the prompt, the answer as the completion."""
    return f"{context}\n\n{question}", answer


main = command(
    Corpus(
        name="squad",
        title="SQuAD 1.1",
        hub_id="rajpurkar/squad",
        prompt="the paragraph, a blank line, the question",
        completion="the first answer",
        columns=("context", "question", "answers.text.0"),
        pair=pair,
        id_column="id",
    )
)

if __name__ == "__main__":
    main()
