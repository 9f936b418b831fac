"""TriviaQA (without evidence): question to answer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command


def reject(question: str, answer: str) -> str | None:
    """Return why a row is left out: the test split withholds its answers."""
    return "answer withheld" if answer == "<unk>" else None


main = command(
    Corpus(
        name="trivia_qa",
        title="TriviaQA (rc.nocontext)",
        hub_id="mandarjoshi/trivia_qa",
        config="rc.nocontext",
        prompt="the question",
        completion="the answer; rows whose answer is withheld (the test split) are dropped",
        columns=("question", "answer.value"),
        reject=reject,
        id_column="question_id",
    )
)

if __name__ == "__main__":
    main()
