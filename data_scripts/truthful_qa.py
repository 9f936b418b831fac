"""TruthfulQA (generation): question to best answer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command

main = command(
    Corpus(
        name="truthful_qa",
        title="TruthfulQA (generation)",
        hub_id="truthfulqa/truthful_qa",
        config="generation",
        split="validation",
        prompt="the question",
        completion="the best answer",
        columns=("question", "best_answer"),
    )
)

if __name__ == "__main__":
    main()
