"""A text while it comes: tokens become pieces of text, which are handed on up to the first stop text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coreinfer_sim.base.errors import GenerationCancelledError

if TYPE_CHECKING:
    import torch

Write = Callable[[str], None]
"""Takes new text piece by piece; what it raises breaks the generation off."""
Cancelled = Callable[[], bool]
"""Says whether nobody wants the text any more."""
Watch = Callable[[Mapping[int, "torch.Tensor"]], None]
"""Takes, after each decode step, the ids that its token read in full, by layer; layers that are not named were read whole."""
_BROKEN = "\ufffd"
"""What decoders write for bytes that are no character, or not yet a whole one."""
_MOST_HELD = 8
"""Such marks at the end of a text that further bytes may still turn into a character, with those of the one before it."""


class TextOutput:
    """The text of one call: it ends before the first stop text; what may be the beginning of one is held back."""

    def __init__(
        self, stops: Sequence[str] = (), write: Write | None = None, cancelled: Cancelled | None = None
    ) -> None:
        """Begin a text.

        Args:
            stops: texts that end it, none of them empty.
            write: receives it piece by piece; no piece is empty.
            cancelled: says whether nobody wants it any more.
        """
        self.stops, self._write, self.cancelled = tuple(stops), write, cancelled
        self._pieces: list[str] = []
        self._held = ""
        self.stopped = False
        """Whether a stop text came."""

    @property
    def text(self) -> str:
        """The text that was handed on."""
        return "".join(self._pieces)

    def check(self) -> None:
        """Raise GenerationCancelledError if nobody wants the text any more."""
        if self.cancelled is not None and self.cancelled():
            raise GenerationCancelledError("the generation was broken off, as its caller asked for.")

    def add(self, piece: str) -> bool:
        """Take new text; return whether the text has come to a stop."""
        if piece and not self.stopped:
            held = self._held + piece
            places = [place for stop in self.stops if (place := held.find(stop)) >= 0]
            self.stopped = bool(places)
            n_safe = min(places) if places else self._beginning(held)
            self._hand_on(held[:n_safe])
            self._held = held[n_safe:]
        return self.stopped

    def stop(self) -> None:
        """End the text here."""
        self.end()
        self.stopped = True

    def end(self) -> str:
        """Hand on what was held back, and return the whole text."""
        if not self.stopped:
            self._hand_on(self._held)
        self._held = ""
        return self.text

    def _beginning(self, text: str) -> int:
        """Return the first place from which a text may go on as a stop."""
        most = max(map(len, self.stops), default=1) - 1
        places = range(max(0, len(text) - most), len(text))
        return next((p for p in places if any(stop.startswith(text[p:]) for stop in self.stops)), len(text))

    def _hand_on(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._write is not None:
                self._write(piece)


class Detokenizer:
    """Turns tokens into text one by one; the pieces join to what the tokens decode to as a whole.

    A token is decoded behind those of the piece before it, since decoders treat the beginning of a text in their own way.
    What ends within a character waits for the rest of it, and nothing else waits.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int] = ()) -> None:
        """Begin a text; tokens among ``ends`` and special ones are no text."""
        self._tokenizer, self._ends = tokenizer, frozenset(ends)
        self._tokens: list[int] = []
        """Those of the latest piece, and those that came after it."""
        self._n_before = 0
        self._n_shown = 0

    def add(self, token: int) -> str:
        """Take the next token; return the text that it makes final."""
        if token in self._ends:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        n_final = len(text.rstrip(_BROKEN))
        if n_final == len(text):
            piece = text[self._n_shown :]
            if piece:  # the next one is decoded behind these tokens
                self._tokens = self._tokens[self._n_before :]
                self._n_before = len(self._tokens)
                self._n_shown = len(self._decode(self._tokens))
            return piece
        return self._show(
            text, max(n_final, len(text) - _MOST_HELD)
        )  # no character is still to come of what lies before

    def end(self) -> str:
        """Return what waited for the rest of a character."""
        text = self._decode(self._tokens)
        return self._show(text, len(text))

    def _show(self, text: str, n_final: int) -> str:
        piece = text[self._n_shown : n_final]
        self._n_shown = max(self._n_shown, n_final)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
