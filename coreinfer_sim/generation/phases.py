"""One call of ``generate``: tells prefill from decode by the cache, and hands decode steps to an engine.

A forward pass that begins before the end of the prompt is prefill, every later one is decode. One-token prompts, chunked
prefill and calls that bring a cache along are therefore right.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coreinfer_sim.base.decode_settings import Prefill
from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.base.memory import reusing_memory
from coreinfer_sim.choosing.predictors import Predictor
from coreinfer_sim.choosing.prompt_reader import PromptReader
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.sizes import BytesRead
from coreinfer_sim.engines.steps import Group, Step, StepInputs
from coreinfer_sim.generation.prefix_cache import PrefixCache, Writer
from coreinfer_sim.generation.reading import passes_of
from coreinfer_sim.generation.streaming import Watch
from coreinfer_sim.generation.turns import Turns


@dataclass(frozen=True)
class CallFacts:
    """What one call chose and cost."""

    selections: tuple[NeuronSelection, ...] = ()
    """One for each row."""
    engine: str = ""
    """What decoded, or would have."""
    not_first: str | None = None
    """Why the first engine that can run the model did not serve this call; None: it did."""
    read: BytesRead = BytesRead()
    """Bytes that decode read."""
    lookup_seconds: float = 0.0
    """To choose the neurons before prefill: the prompts' embeddings and the nearest clusters."""
    prepare_seconds: float = 0.0
    """To prepare the held weights and put them in place; next to nothing if they are at hand from an earlier prompt."""
    prepared_in_decode: bool = True
    """Whether that was after prefill, as it is unless prefill is sparse or the weights lie on disk."""
    n_known: int = 0
    """Tokens of the prompt whose keys and values were kept from an earlier text."""
    decode_began: float | None = None
    """When the first pass after prefill began, by `time.perf_counter`; None: there was none."""


def groups_of(selections: Sequence[NeuronSelection]) -> list[tuple[NeuronSelection, list[int]]]:
    """Return each selection of a batch with the rows that decode by it."""
    rows: dict[tuple[int, float], list[int]] = {}
    unique: dict[tuple[int, float], NeuronSelection] = {}
    for row, selection in enumerate(selections):
        key = id(selection.ids), selection.read_ratio
        unique.setdefault(key, selection)
        rows.setdefault(key, []).append(row)
    return [(selection, rows[key]) for key, selection in unique.items()]


class PhasedCall:
    """One call of a model's ``generate``, within `running`."""

    def __init__(
        self,
        model: Any,
        engines: Sequence[Engine],
        predictor: Predictor,
        mask: torch.Tensor,
        prompts: Sequence[str] | None,
        ends: torch.Tensor,
        chunked: bool = False,
        turns: Turns | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Choose the neurons, unless the predictor wants the prompts' activations first.

        Args:
            model: of transformers.
            engines: that may decode it, best first.
            predictor: chooses the neurons.
            mask: of the prompts, [n_rows, n_positions], padded on the left.
            prompts: by which rows are routed.
            ends: tokens that end a text.
            chunked: the caller has said how many positions a pass of prefill reads; otherwise the engine does.
            turns: that the call takes with others, where the engine lets calls share their steps; None: it has the model to
                itself.
            watch: receives which neurons the first row's tokens read.
        """
        self._model, self._engines, self._engine = model, engines, engines[0]
        self._predictor, self._mask, self._prompts, self._ends = predictor, mask, prompts, ends
        self._chunked, self._turns, self._watch = chunked, turns, watch
        self._refused: str | None = None
        self._prepare_seconds, self._prepared_in_decode = 0.0, True
        self._decode_began: float | None = None
        begin = time.perf_counter()
        known = predictor.select(prompts, None, len(mask))
        self._lookup_seconds = time.perf_counter() - begin
        self._selections: list[NeuronSelection] = known or []
        self._reader: PromptReader | None = None
        """Reads the prompt's activations, if the predictor needs them."""
        if known is None:
            if predictor.alpha is None:
                raise ConfigError(f"{predictor.mode} mode gave no selection and reads no activations.")
            self._reader = PromptReader(mask, predictor.alpha)
        self._groups: list[Group] = []
        self._mount = ExitStack()
        """Holds the weights of sparse prefill in the model."""
        self._decoding = False
        self._cache: Any = None
        """Of transformers, as the latest pass was given it."""
        self._n_known = 0
        self._n_copies = 1
        self._starts, self._finished = np.zeros(0, np.int64), np.zeros(0, bool)

    @property
    def facts(self) -> CallFacts:
        """What was chosen and what it cost so far."""
        return CallFacts(
            tuple(self._selections),
            self._engine.name,
            self._refused,
            self._engine.read(),
            self._lookup_seconds,
            self._prepare_seconds,
            self._prepared_in_decode,
            self._n_known,
            self._decode_began,
        )

    def known(self, prefixes: PrefixCache, ids: torch.Tensor) -> Any:
        """Return a cache of the beginning of the call's one prompt [n_tokens], or None.

        A predictor that wants the prompt's activations reads all of it.
        """
        found = None if self._reader is not None else prefixes.find(self._model, ids, self._writer)
        self._n_known = 0 if found is None else int(found.get_seq_length())
        return found

    def keep(self, prefixes: PrefixCache, ids: torch.Tensor, n_prompt: int) -> None:
        """Keep the call's one text [n_tokens]: its prompt, and the rest where decode has read it as prefill would."""
        if self._decoding:
            (selection,) = self._selections
            alike = self._engine.reads_as_prefill and selection.read_ratio == 1
            n_prompt = len(ids) if alike and _writer(selection) is self._writer else n_prompt
        if self._cache is not None:
            prefixes.keep(self._model, ids[:n_prompt], self._cache, self._writer)

    @property
    def _writer(self) -> Writer:
        """What reads the prompt."""
        return _writer(self._selections[0]) if self._engine.config.prefill is Prefill.SPARSE else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the model's forward passes in the block be phases of this call; afterwards the model is its dense self."""
        for engine in self._engines:
            engine.release()
            engine.call.watched = self._watch is not None
        with ExitStack() as stack, self._mount:
            stack.enter_context(self._engine.running())
            if self._reader is not None:
                stack.enter_context(self._reader.reading(self._engine.layers))
            else:
                self._begin_prefill()
            for engine in self._engines:
                stack.callback(engine.release)
            stack.enter_context(_passes_through(self._model, self._forward, self._compiled))
            yield

    def finish(self) -> None:
        """At the end: where nothing was decoded, the choice is of interest all the same."""
        if self._reader is not None and not self._decoding:
            self._select()

    def _begin_prefill(self) -> None:
        """Fetch weights that are away, so that decode follows prefill at once; put them in place if prefill is sparse."""
        sparse = self._engine.config.prefill is Prefill.SPARSE
        if not sparse and not self._engine.layers[0].away:
            return
        begin, self._prepared_in_decode = time.perf_counter(), False
        self._prepare()
        if sparse:
            self._mount.enter_context(self._engine.mounted(self._groups))
        self._prepare_seconds = time.perf_counter() - begin

    def _prepare(self) -> None:
        parts = groups_of(self._selections)
        held = self._engine.prepare([selection for selection, _ in parts])
        self._groups = [(rows, prepared) for (_, rows), prepared in zip(parts, held, strict=True)]

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's forward pass: prefill goes through it, decode steps through the engine."""
        self._cache = cache = kwargs.get("past_key_values")  # none where transformers reads a text anew
        if not self._decoding:
            n_past = int(cache.get_seq_length()) if cache is not None else 0
            if n_past < self._mask.shape[1]:
                return self._prefill(original, args, kwargs, n_past)
            self._begin_decode(cache, kwargs)
        ids = kwargs["input_ids"]
        if self._engine.skips_finished and len(ids) == len(
            self._mask
        ):  # among the beams of a prompt rows change places
            self._finished |= torch.isin(ids[:, -1].cpu(), self._ends).numpy()
        inputs = StepInputs(ids, cache, kwargs, self._starts, self._finished, self._n_copies, original)
        output = self._step(inputs)
        if self._watch is not None:
            self._watch(self._engine.neurons_read()[0])
        return output

    def _step(self, inputs: StepInputs) -> Any:
        """Decode a token in every row, with other calls where that is possible; each keeps its own random numbers."""
        engine, sharing = self._engine, self._engine.sharing
        of_decode = engine.config.prefill is Prefill.DENSE and inputs.ids.shape[1] == 1
        if self._turns is None or sharing is None or not of_decode:
            return engine.step(inputs, self._groups)
        own, rng_state = engine.call, torch.get_rng_state()
        output = self._turns.step(sharing, Step(inputs, self._groups, own))
        engine.call = own
        torch.set_rng_state(rng_state)
        return output

    def _prefill(
        self, original: Callable[..., Any], args: tuple[Any, ...], given: Mapping[str, Any], n_past: int
    ) -> Any:
        """Read a part of the prompt after ``n_past`` positions; the last pass gives the logits."""
        output = None
        with reusing_memory():
            for part in passes_of(given, None if self._chunked else self._engine.pass_tokens):
                if self._reader is not None:
                    self._reader.begin(part["input_ids"], n_past)
                output = original(*args, **part)
                n_past += part["input_ids"].shape[1]
        if output is not None and bool(output.logits[:, -1].isnan().any()):
            raise GenerationError(
                "the model gives what is no number (NaN) for the prompt, expected logits; its weights are damaged, or their type "
                "is too narrow: fetch the model again, or set model.dtype to float32."
            )
        return output

    def _compiled(self, original: Callable[..., Any], config: Any) -> Callable[..., Any]:
        """Return what transformers decodes with where it would compile: the bare forward code, without hooks."""

        def step(*args: Any, **kwargs: Any) -> Any:
            return self._forward(self._engine.compiled(original, config), *args, **kwargs)

        return step

    def _begin_decode(self, cache: Any, given: dict[str, Any]) -> None:
        self._decoding, self._decode_began = True, time.perf_counter()
        if self._reader is not None:
            self._reader.pause()
            self._select()
        begin = time.perf_counter()
        self._take_engine(cache, given)
        if not self._groups:
            self._prepare()
        self._n_copies = len(given["input_ids"]) // len(self._mask)
        self._starts = self._mask.long().argmax(1).repeat_interleave(self._n_copies).cpu().numpy()
        self._finished = np.zeros(len(self._starts), bool)
        self._prepare_seconds += time.perf_counter() - begin

    def _take_engine(self, cache: Any, given: dict[str, Any]) -> None:
        """Keep the first engine that can serve this call; another one prepares the weights anew."""
        reasons: list[str] = []
        for engine in self._engines:
            reason = engine.refuses_call(cache, self._mask, given)
            if reason is None:
                if engine is not self._engine:
                    self._mount.close()  # weights can only be cut from the dense model
                    self._engine, self._groups = engine, []
                self._refused = "; ".join(reasons) or None
                return
            reasons.append(f"{engine.name}: {reason}")
        raise ConfigError(f"no engine can serve this call ({'; '.join(reasons)}); leave the engine at auto.")

    def _select(self) -> None:
        assert self._reader is not None
        found = self._predictor.select(self._prompts, self._reader.statistics, len(self._mask))
        assert found is not None
        self._selections = found


def _writer(selection: NeuronSelection) -> Writer:
    """Return what reads with the neurons of a selection."""
    return selection.ids or None


class _Passes:
    """Stands in for a model's forward pass: those of a thread go through the call that it makes."""

    def __init__(self, model: Any) -> None:
        """Stand in for the forward pass of ``model``, from now on until `restore`."""
        self._model, self._original, self._own = model, model.forward, vars(model).get("forward")
        self.calls: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        """By thread: what is called in place of a pass, and of making a compiled one."""

        @functools.wraps(model.forward)
        def through(*args: Any, **kwargs: Any) -> Any:
            call = self.calls.get(threading.get_ident())
            return self._original(*args, **kwargs) if call is None else call[0](self._original, *args, **kwargs)

        model.forward, model.passes = through, self
        model.get_compiled_call = lambda config: self.calls[threading.get_ident()][1](self._original, config)

    def restore(self) -> None:
        """Leave the model as it was."""
        del self._model.get_compiled_call, self._model.passes
        if self._own is None:
            del self._model.forward
        else:
            self._model.forward = self._own


@contextmanager
def _passes_through(
    model: Any, forward: Callable[..., Any], compiled: Callable[[Callable[..., Any], Any], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block let this thread's calls of the model go through ``forward(original, …)``, and compiled ones likewise."""
    passes: _Passes = vars(model).get("passes") or _Passes(model)
    thread = threading.get_ident()
    passes.calls[thread] = forward, compiled
    try:
        yield
    finally:
        del passes.calls[thread]
        if not passes.calls:
            passes.restore()
