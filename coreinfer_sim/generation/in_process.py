"""TextGenerator: a model that is loaded in this process, decoded by an engine of `registry`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

import torch
from transformers import StoppingCriteriaList

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, SamplingConfig, SelectionConfig
from coreinfer_sim.base.errors import ContextLengthError, GenerationCancelledError, SamplingError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.base.settings import Mode
from coreinfer_sim.choosing.compatibility import check_model
from coreinfer_sim.choosing.make import predictor_of
from coreinfer_sim.choosing.predictors import FixedPredictor, Predictor
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.calibration import calibrate
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.engines.steps import Group
from coreinfer_sim.generation.prefix_cache import PrefixCache
from coreinfer_sim.generation.reading import read_prompt
from coreinfer_sim.generation.routing import chat_format_of, routing_text
from coreinfer_sim.generation.sparse_model import SparseModel
from coreinfer_sim.generation.streaming import Cancelled, TextOutput
from coreinfer_sim.generation.text import Generation, Generator, Request
from coreinfer_sim.generation.watch import GenerationWatch, generate_options
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.prompts import prompt_ids, within


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
        self.prefixes = PrefixCache(0 if self.decode.memory_budget is not None else self.decode.prefix_bytes)
        """Keys and values of recent texts, for all modes."""
        self._unread: torch.Tensor | None = None
        """The latest text, [1, n_tokens], if not all neurons have read its answer."""
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
        return SparseModel(
            model.model, predictor, model.tokenizer, self.decode, engines=self.engines, prefixes=self.prefixes
        )

    @property
    def takes_turns(self) -> bool:
        """Whether calls of several threads share their decode steps; otherwise each waits for the one before it."""
        return self.engines[0].sharing is not None and self.decode.prefill is Prefill.DENSE

    def _generate(self, request: Request) -> Generation:
        with self.sparse_model().turns.call(request.output.check):
            return self._generate_in_turn(request)

    def _generate_in_turn(self, request: Request) -> Generation:
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
                output, facts = sparse.generate_beside_others(
                    ids,
                    [request.routed_by],
                    attention_mask=torch.ones_like(ids),
                    pad_token_id=model.tokenizer.pad_token_id,
                    stopping_criteria=StoppingCriteriaList([watch]),
                    watch=request.watch,
                    **generate_options(sampling),
                )
        except ValueError as error:  # transformers' own word on settings that contradict each other
            reason = " ".join(str(error).split())[:300]
            raise SamplingError(f"transformers refused the settings ({reason}); change or leave them out.") from error
        # 3) what came of it
        new = output[0, n_prompt:].tolist()
        text = watch.end(new)
        assert watch.first_token is not None and watch.latest_token is not None
        first, end = watch.first_token, watch.latest_token
        selection = facts.selections[0]
        counted = facts.read.n_steps > 0
        engine = next(engine for engine in self.engines if engine.name == facts.engine)
        self._unread = output if self._is_read_again(selection) and len(output) == 1 else None
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
            n_cached_tokens=facts.n_known,
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

    def _is_read_again(self, selection: NeuronSelection) -> bool:
        """Return whether a next turn will read the answer once more, and goes on from what was kept."""
        is_sparse = bool(selection.ids) or selection.read_ratio < 1
        reads_all = selection.mode in (Mode.STABILITY.value, Mode.HYBRID.value)
        return is_sparse and not reads_all and self.decode.prefill is Prefill.DENSE and self.prefixes.limit > 0

    def read_ahead(self, cancelled: Cancelled) -> None:
        """Read the latest answer densely, as the next turn of its conversation would, and keep it."""
        text, self._unread = self._unread, None
        model, limit = self.language_model, self.language_model.context_length
        if text is None or (limit is not None and text.shape[1] >= limit):
            return
        reader = self._wrapped(FixedPredictor(NeuronSelection(Mode.DENSE.value)))
        output = TextOutput(cancelled=lambda: cancelled() or reader.turns.is_wanted)
        watch = GenerationWatch(model.tokenizer, output, text.shape[1])
        with suppress(GenerationCancelledError), reader.turns.alone() as is_free:
            if is_free:
                with watch.in_prefill(model.model):
                    options = generate_options(SamplingConfig(max_new_tokens=1))
                    reader.generate_beside_others(text, None, attention_mask=torch.ones_like(text), **options)

    @property
    def tells_neurons(self) -> bool:
        """Engines in this process know."""
        return True

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
        """Let go of the prepared weights, and of the texts that were read."""
        self.prefixes.clear()
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


def _least(sampling: SamplingConfig, n_new: int) -> int | None:
    return None if sampling.min_new_tokens is None else min(sampling.min_new_tokens, n_new)
