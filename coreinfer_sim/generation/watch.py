"""What transformers' ``generate`` is given: settings by its own names, and a criterion that looks at every new token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria

from coreinfer_sim.base.decode_settings import SamplingConfig
from coreinfer_sim.generation.streaming import Detokenizer, TextOutput

_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_ALWAYS = ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")


def generate_options(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the settings as transformers' ``generate`` names them, but for stop texts, which `GenerationWatch` looks for.

    A checkpoint's own sampling settings do not apply to greedy decoding.
    """
    found: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.samples}
    found["num_beams"] = sampling.num_beams
    if sampling.samples:
        found.update({name: getattr(sampling, name) for name in _SAMPLED if getattr(sampling, name) is not None})
    else:
        found.update(temperature=None, top_k=None, top_p=None)
    found.update({name: getattr(sampling, name) for name in _ALWAYS if getattr(sampling, name) is not None})
    if sampling.ignore_eos:  # rather than a least length, which costs a pass over all logits
        found["eos_token_id"] = None
    return found


class GenerationWatch(StoppingCriteria):
    """Looks at every new token: makes text of it, ends at a stop text, and breaks off what nobody wants any more."""

    def __init__(self, tokenizer: Any, output: TextOutput, n_prompt: int, ends: Sequence[int] = ()) -> None:
        """Begin a text.

        Args:
            tokenizer: of the model.
            output: takes the text.
            n_prompt: tokens of the prompt.
            ends: tokens that end a text.
        """
        self._tokenizer, self._output, self._n_prompt, self._ends = tokenizer, output, n_prompt, ends
        self._detokenizer = Detokenizer(tokenizer, ends)
        added = tokenizer.added_tokens_decoder if output.stops else {}
        self._stop_ids = {number for number, token in added.items() if token.content in output.stops}
        """Tokens that are stop texts as a whole, as special ones may be, which are no text."""
        self._hooks: list[Any] = []
        self._streams = True
        self.first_token: float | None = None
        """When the first new token came, by `time.perf_counter`."""
        self.latest_token: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Look at the newest tokens of rows [n_rows, n_positions]; return which rows have come to a stop."""
        self.latest_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.latest_token
            self._remove_hooks()
            self._streams = len(input_ids) == 1
        self._output.check()
        if self._streams:
            stopped = [self._take(int(input_ids[0, -1]))]
        else:  # beams change places, so that no row's text is known before the end
            stopped = [self._has_stop(row[self._n_prompt :].tolist()) for row in input_ids]
        return torch.tensor(stopped, device=input_ids.device)

    def _take(self, token: int) -> bool:
        if token in self._stop_ids:
            self._output.add(self._detokenizer.end())
            self._output.stop()
        else:
            self._output.add(self._detokenizer.add(token))
        return self._output.stopped

    @contextmanager
    def in_prefill(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the block, ask before every step of the model's forward code whether somebody still wants the text.

        From the first new token on, that is asked once a token.
        """
        if self._output.cancelled is not None:
            steps = [module for module in model.modules() if next(module.children(), None) is None]
            self._hooks = [step.register_forward_pre_hook(lambda *_: self._output.check()) for step in steps]
        try:
            yield
        finally:
            self._remove_hooks()

    def end(self, tokens: list[int]) -> str:
        """Hand on the rest of the text, whose tokens are given, and return it whole."""
        if not self._streams:
            tokens = [token for token in tokens if token not in self._ends]
            self._output.add(self._decode(tokens))
        else:
            self._output.add(self._detokenizer.end())
        return self._output.end()

    def _has_stop(self, tokens: list[int]) -> bool:
        return bool(self._output.stops) and any(stop in self._decode(tokens) for stop in self._output.stops)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
