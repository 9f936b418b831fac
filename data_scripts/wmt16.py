"""WMT16: German or Romanian sentence to English."""

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from data_scripts.common import Corpus, command
else:  # run as a file
    from common import Corpus, command


def corpus(pair: str) -> Corpus:
    """Return the corpus of one pair, such as `de-en`: from the first language into the second."""
    source, target = pair.split("-")
    return Corpus(
        name=f"wmt16-{pair}",
        title="WMT16 (news translation)",
        hub_id="wmt/wmt16",
        config=pair,
        prompt="the sentence in the first language of --pair",
        completion="the same sentence in English",
        columns=(f"translation.{source}", f"translation.{target}"),
    )


main = command(corpus("de-en"), corpus("ro-en"), flag="--pair")

if __name__ == "__main__":
    main()
