"""EleutherAI's LM Evaluation Harness on sparse decode: importing this registers the model ``coreinfer_sim`` of lm-eval.

A context is read densely, few-shot examples included; the question at its end routes (`last_question`), so that examples
change what the model reads and not where a question goes. The context's last token is then decoded: were it part of the
dense prefill, it would predict the continuation's first token, and a task whose choices are single tokens would measure the
dense model. So every token of a continuation that is scored comes from the compact MLPs. Texts of `generate_until` are those
of `generate`: their first token is the dense prefill's, which a task whose answers are one token would measure.

A rolling log-likelihood has no context: the document's own beginning is its prompt. The prefix token and the document's
first tokens are read densely (`rolling_prompt` positions, which predict as many tokens, and these count) and choose the
neurons; the rest of the document, and every later window with all its positions, runs under the compact MLPs.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from coreinfer_sim.base.decode_settings import ModelConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError, ContextLengthError, CoreInferSimError
from coreinfer_sim.engines.prepared import Prepared
from coreinfer_sim.generation.in_process import TextGenerator
from coreinfer_sim.generation.opening import load
from coreinfer_sim.generation.reading import PromptRead, read_prompt
from coreinfer_sim.generation.routing import last_question

_log = logging.getLogger(__name__)

LogLikelihood = tuple[float, bool]
"""Sum over tokens in nats, and whether each token is the likeliest."""


@register_model("coreinfer_sim")
class CoreInferLM(HFLM):
    """lm-eval's transformers model with dense prefill and sparse decode.

    Tokenisation, windows, chat templates and batches of texts to generate are lm-eval's own. Log-likelihoods are computed
    one context at a time, all its continuations from one prefill; ``batch_size`` counts for `generate_until` alone.

    Example:
        >>> import lm_eval, coreinfer_sim.evaluation.harness
        >>> args = "model=./my-model,index=my-index,mode=similarity,keep_ratio=0.8"
        >>> lm_eval.simple_evaluate("coreinfer_sim", args, tasks=["arc_easy"])
    """

    def __init__(
        self,
        model: str | None = None,
        index: str | None = None,
        profile: str | None = None,
        mode: str = "similarity",
        keep_ratio: float | None = None,
        score: str = "energy",
        sparse_layers: str | None = None,
        alpha: float | None = None,
        seed: int = 0,
        encoder: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        engine: str = "auto",
        weights: str = "stored",
        rolling_prompt: int = 64,
        **options: Any,
    ) -> None:
        """Load the model and the index.

        Args:
            model: hub id, checkpoint folder or GGUF file.
            index: folder; similarity and global need it.
            profile: of the index: exact, balanced or fast; None: its default, unless a mode or a keep ratio is given.
            mode: similarity, hybrid, stability, global, random or dense.
            keep_ratio: share of d_ff that is held; None takes the index's.
            score: energy or paper.
            sparse_layers: slice of the layers that become sparse; None: those of the index, or all.
            alpha: for stability.
            seed: for random.
            encoder: sentence encoder, hub id or folder; None: the index's.
            dtype: of the weights; auto: as stored, bfloat16 for GGUF.
            device: torch device; auto: a GPU if there is one, and so is lm-eval's own default, cuda:0, where there is none.
            engine: what decodes, and is scored.
            weights: stored or int8.
            rolling_prompt: positions of a rolling document that are read densely, its prefix token among them.
            **options: of `HFLM`, such as batch_size, max_length, add_bos_token.

        Raises:
            CoreInferSimError: as `load` does.
        """
        if model is None:
            raise ConfigError("the arguments name no model, expected model=NAME among --model_args.")
        if unknown := sorted(set(options) - set(inspect.signature(HFLM.__init__).parameters)):
            raise ConfigError(
                f"the arguments name {', '.join(unknown)}, which neither this model nor lm-eval's own knows; leave them out."
            )
        if rolling_prompt < 1:
            raise ConfigError(f"rolling_prompt is {rolling_prompt}, expected 1 or more.")
        if device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("There is no GPU here for %s: decoding on the CPU.", device)
            device = "auto"
        selection = SelectionConfig(
            mode=mode,  # type: ignore[arg-type]  # it turns names into choices
            keep_ratio=keep_ratio,
            score=score,  # type: ignore[arg-type]
            sparse_layers=None if sparse_layers is None else str(sparse_layers),  # lm-eval makes a number of "3"
            alpha=alpha,
            seed=seed,
        )
        opened = load(
            index,
            model,
            profile=profile,
            selection=selection,
            loading=ModelConfig(dtype, device, encoder),
            engine=engine,
            weights=weights,
        )
        if not isinstance(opened, TextGenerator):
            raise ConfigError(f"the engine {engine} was named, expected one that decodes in this process.")
        self._generator, self._language_model = opened, opened.language_model
        self._sparse = opened.sparse_model()
        self._engine = opened.engines[0]
        self._rolling_prompt = rolling_prompt
        self._documents: Mapping[str, Any] = {}
        self._batch: list[str] = []
        super().__init__(self._language_model.model, tokenizer=self._language_model.tokenizer, **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[LogLikelihood]:
        """Score continuations, each routed by its document's question."""
        self._documents = _documents(requests)
        found: list[LogLikelihood] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate texts, each routed by its document's question."""
        self._documents = _documents(requests)
        found: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return found

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **options: Any) -> Any:
        """Encode contexts, and keep them for the call that generates from their ids."""
        self._batch = list(strings)
        return super().tok_batch_encode(strings, *args, **options)

    def _routed_by(self, context: str) -> str:
        """Return the text that routes a context."""
        return last_question(context, self._documents.get(context), self._generator.chat_format)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[LogLikelihood]:
        """Score (texts, context tokens, continuation tokens); the context is cut on the left to what fits."""
        by_context: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ContextLengthError(
                    f"a continuation has {len(continuation)} tokens, but the model's context is {self.max_length}; leave "
                    "that task out or raise max_length."
                )
            kept = tuple((context or [self.prefix_token_id])[-room:])
            by_context.setdefault((self._routed_by(texts[0]), kept), []).append(number)
        answers: dict[int, LogLikelihood] = {}
        for (routed, kept), numbers in tqdm(by_context.items(), "Contexts", disable=disable_tqdm):
            found = self.score_context(list(kept), [requests[number][2] for number in numbers], routed)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [answers[number] for number in range(len(requests))]

    def score_context(
        self, context: list[int], continuations: Sequence[list[int]], routed_by: str | None = None
    ) -> list[LogLikelihood]:
        """Score continuations, as token ids, of one context that is read once; ``routed_by`` None: it routes as it is."""
        *beginning, last = context
        read, held = self._read(beginning or context, routed_by=routed_by)
        cache = read.cache if beginning else None
        return [
            self._log_likelihood(self._engine.forced(self._ids([last, *continuation[:-1]]), cache, held), continuation)
            for continuation in continuations
        ]

    def _read(self, prompt: list[int], n_logits: int = 1, routed_by: str | None = None) -> tuple[PromptRead, Prepared]:
        """Read a prompt densely and prepare the neurons that decode holds."""
        predictor = self._sparse.predictor
        read = read_prompt(self._language_model, self._engine, self._ids(prompt), predictor.alpha, n_logits)
        text = self.tokenizer.decode(prompt, skip_special_tokens=True) if routed_by is None else routed_by
        selections = predictor.select([text], read.statistics, 1)
        assert selections is not None
        return read, self._engine.prepare(selections)[0]

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    def _log_likelihood(self, logits: torch.Tensor, tokens: Sequence[int]) -> LogLikelihood:
        """Return the answer for logits [n_tokens, vocabulary] that predict ``tokens``."""
        targets = torch.tensor(list(tokens), device=logits.device, dtype=torch.long)
        logits = logits[: len(targets)]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return -float(loss), bool((logits.argmax(-1) == targets).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each document's log-likelihood in nats; see the module for what is dense."""
        answers = []
        for (text,) in tqdm([request.args for request in requests], "Documents", disable=disable_tqdm):
            answers.append(self._score_document(self.tok_encode(text)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
        return answers

    def _score_document(self, tokens: list[int]) -> float:
        windows = [
            make_disjoint_window(window)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        ]
        if not windows:
            return 0.0
        (prefix, beginning), *later = windows
        positions = [*prefix, *beginning[:-1]]
        n_prompt = min(self._rolling_prompt, len(positions))
        first, held = self._read(positions[:n_prompt], n_prompt)
        logits = first.logits
        if n_prompt < len(positions):
            decoded = self._engine.forced(self._ids(positions[n_prompt:]), first.cache, held)
            logits = torch.cat([logits, decoded])
        total, _ = self._log_likelihood(logits, beginning)
        for context, continuation in later:
            logits = self._engine.forced(self._ids([*context, *continuation[:-1]]), None, held)
            total += self._log_likelihood(logits[-len(continuation) :], continuation)[0]
        return total

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate by `SparseModel`; the batch's rows are routed by the questions of their own contexts."""
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)  # lm-eval's 0.0 means greedy
        generated: torch.Tensor = self._sparse.generate(
            context,
            prompts=[self._routed_by(text) for text in self._batch],
            max_length=max_length,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
            pad_token_id=self.tokenizer.pad_token_id,
            **generation_kwargs,
        )
        return generated


def _documents(requests: Sequence[Any]) -> Mapping[str, Any]:
    """Return the documents of requests by their contexts."""
    return {request.args[0]: request.doc for request in requests}


if __name__ == "__main__":  # lm-eval's own command, which knows the model now
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except CoreInferSimError as error:
        sys.exit(f"Error: {error}")
