"""TextGenerator: a model that is loaded in this process, decoded by an engine of `registry`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ContextLengthError, SamplingError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.choosing.make import predictor_of
from coreinfer_sim.choosing.predictors import Predictor
from coreinfer_sim.engines.calibration import calibrate
from coreinfer_sim.engines.face import Engine, Group
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.generation.reading import read_prompt
from coreinfer_sim.generation.routing import chat_format_of, routing_text
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.generation.streaming import Detokenizer, TextOutput
from coreinfer_sim.generation.text import Generation, Generator, Request
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.prompts import prompt_ids, within

_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_ALWAYS = ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")


class TextGenerator(Generator):
    """Generates with a loaded model."""

    def __init__(
        self,
        language_model: LanguageModel,
        index: SemanticIndex | None = None,
        selection: SelectionConfig | None = None,
        decode: DecodeConfig | None = None,
        *,
        predictor: Predictor | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Generate with a model.

        Args:
            language_model: the loaded model.
            index: routes prompts; it must belong to the model.
            selection: which neurons decode holds; its mode is the default of calls.
            decode: what decodes.
            predictor: chooses the neurons in place of ``selection``; then there is one mode, its own.
            progress: of what reading by token needs to know, where it was not measured before.

        Raises:
            ConfigError: settings that contradict each other, the index or the model.
            IndexMismatchError: the index belongs to another model.
        """
        super().__init__()
        if index is not None:
            check_model(index, language_model.layers)
        self.language_model, self.index, self.name = language_model, index, language_model.name
        self.chat_format = chat_format_of(language_model.tokenizer)
        self.selection = (selection or SelectionConfig()).resolved(index is not None)
        self.decode = decode or DecodeConfig()
        self.engines, self.refused = choose_engines(language_model.model, language_model.layers, self.decode)
        if self.selection.by_token:
            known = None if index is None else index.histograms
            calibrate(self.engines[0], language_model.tokenizer, progress, known)
            if self.selection.named_mode is not Mode.DENSE:
                self.engines[0].check_by_token()
        self._sparse: dict[str, SparseModel] = {}
        if predictor is not None:
            self.modes: tuple[str, ...] = (predictor.mode,)
            self._sparse[predictor.mode] = self._wrapped(predictor)
            return
        others = [each.value for each in Mode]
        self.modes = tuple(dict.fromkeys([self.selection.named_mode.value, *others]))
        self.sparse_model()  # what is wrong with the settings is known before anything is generated

    def sparse_model(self, mode: str | None = None) -> SparseModel:
        """Return the wrapper that decodes in a mode; all of them share the engines and their prepared weights."""
        mode = self.checked_mode(mode)
        if mode not in self._sparse:
            config = replace(self.selection, mode=Mode(mode))
            self._sparse[mode] = self._wrapped(predictor_of(config, self.language_model.layers, self.index))
        return self._sparse[mode]

    def _wrapped(self, predictor: Predictor) -> SparseModel:
        model = self.language_model
        return SparseModel(model.model, predictor, model.tokenizer, self.decode, engines=self.engines)

    def _generate(self, request: Request) -> Generation:
        # 1) ids that fit
        model, sparse, sampling = self.language_model, self.sparse_model(request.mode), request.sampling
        ids = prompt_ids(model.tokenizer, model.name, request.prompt, request.chat, request.chat_template_kwargs)
        ids = ids.to(model.model.device)
        n_prompt = ids.shape[1]
        if request.shorten:
            n_new = within(model.context_length, n_prompt, sampling.max_new_tokens)
            sampling = replace(sampling, max_new_tokens=n_new, min_new_tokens=_least(sampling, n_new))
        self._check_length(n_prompt, sampling.max_new_tokens)
        # 2) prefill and decode
        ends = [] if sampling.ignore_eos else self._ends()
        watch = GenerationWatch(model.tokenizer, request.output, n_prompt, ends)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        begin = time.perf_counter()
        try:
            with watch.in_prefill(model.model):
                output = sparse.generate(
                    ids,
                    prompts=[request.routed_by],
                    attention_mask=torch.ones_like(ids),
                    pad_token_id=model.tokenizer.pad_token_id,
                    stopping_criteria=StoppingCriteriaList([watch]),
                    **generate_options(sampling),
                )
        except ValueError as error:  # transformers' own word on settings that contradict each other
            reason = " ".join(str(error).split())[:300]
            raise SamplingError(f"transformers refused the settings ({reason}); change or leave them out.") from error
        end = time.perf_counter()
        # 3) what came of it
        facts = sparse.latest
        new = output[0, n_prompt:].tolist()
        text = watch.end(new)
        first = watch.first_token or end
        selection = facts.selections[0]
        counted = facts.read.n_steps > 0
        engine = next(engine for engine in self.engines if engine.name == facts.engine)
        return Generation(
            prompt=request.routed_by,
            text=text,
            token_ids=new,
            n_new_tokens=len(new),
            ended=request.output.stopped or len(new) < sampling.max_new_tokens or new[-1] in self._ends(),
            selection=selection,
            keep_ratio=selection.keep_ratio(sparse.layers),
            engine=facts.engine,
            n_prompt_tokens=n_prompt,
            prefill_seconds=first - begin,
            decode_seconds=end - first - (facts.prepare_seconds if facts.prepared_in_decode else 0.0),
            mlp_bytes_per_token=facts.read.mlp_per_step if counted else None,
            dense_mlp_bytes_per_token=engine.whole_bytes(),
            total_bytes_per_token=facts.read.per_step if counted else None,
            lookup_seconds=facts.lookup_seconds,
            prepare_seconds=facts.prepare_seconds,
            not_first=facts.not_first or self.refused,
            read_ratio=facts.read.read_ratio if counted else None,
            skips_zeros=engine.skips_zeros and selection.read_ratio == 1,
            disk_bytes_per_token=facts.read.disk_per_step,
            found_ratio=facts.read.found_ratio,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has one."""
        return self.language_model.tokenizer.chat_template is not None

    def score(self, prompt: str, completion: str, *, mode: str | None = None) -> list[float]:
        """Return the log-probability of each completion token; see `Generator.score`."""
        model, sparse, engine = self.language_model, self.sparse_model(mode), self.engines[0]
        ids = prompt_ids(model.tokenizer, model.name, prompt, chat=False)
        completion_ids = model.tokenizer(completion, add_special_tokens=False)["input_ids"]
        self._check_length(ids.shape[1], len(completion_ids))
        if not completion_ids:
            return []
        new = torch.tensor([completion_ids], device=model.model.device)
        with sparse.held():
            logits = self._forced_logits(sparse.predictor, engine, prompt, ids, new)
        found = torch.log_softmax(logits.float(), -1).gather(1, new[0, :, None])
        return found[:, 0].tolist()

    def _forced_logits(
        self, predictor: Predictor, engine: Engine, prompt: str, ids: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits that predict each token of ``new``, [1, n], behind a prompt: [n, vocabulary]."""
        # 1) the prompt, as prefill reads it, and the held neurons
        routed = [routing_text(self.index, prompt, self.chat_format)]
        known = predictor.select(routed, None, 1) if self.decode.prefill is Prefill.SPARSE else None
        groups: list[Group] = [] if known is None else [([0], each) for each in engine.prepare(known)]
        with engine.mounted(groups) if groups else nullcontext():
            read = read_prompt(self.language_model, engine, ids, predictor.alpha)
        selections = known or predictor.select(routed, read.statistics, 1)
        assert selections is not None
        # 2) the completion; its first token is the prompt's to predict
        if new.shape[1] == 1:
            return read.logits
        (held,) = engine.prepare(selections)
        return torch.cat([read.logits, engine.forced(new[:, :-1], read.cache, held)])

    def take_over(self) -> None:
        """Let go of what the engine holds in another layout; to be called where nobody else uses the model."""
        self.engines[0].take_over()

    def close(self) -> None:
        """Let go of the prepared weights."""
        for engine in self.engines:
            engine.close()

    def _ends(self) -> Sequence[int]:
        ends = self.language_model.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _check_length(self, n_prompt: int, n_new: int) -> None:
        limit = self.language_model.context_length
        if limit is not None and n_prompt + n_new > limit:
            budgeted = limit == self.language_model.position_limit
            what = "the memory budget has room for" if budgeted else "the model's context is"
            if n_prompt >= limit:
                raise ContextLengthError(
                    f"the prompt has {n_prompt} tokens, but {what} {limit}, into which the answer has to fit too; shorten the "
                    "prompt."
                )
            raise ContextLengthError(
                f"the prompt has {n_prompt} tokens and {n_new} new ones were asked for, but {what} {limit}; shorten the prompt "
                f"or ask for at most {limit - n_prompt}."
            )


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


def _least(sampling: SamplingConfig, n_new: int) -> int | None:
    return None if sampling.min_new_tokens is None else min(sampling.min_new_tokens, n_new)


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

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Look at the newest tokens of rows [n_rows, n_positions]; return which rows have come to a stop."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
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
