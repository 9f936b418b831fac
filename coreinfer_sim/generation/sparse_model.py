"""SparseModel: a loaded transformers model whose `generate` prefills densely and decodes sparsely."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.base.memory import give_back_memory
from coreinfer_sim.base.settings import Engine, Weights
from coreinfer_sim.choosing.predictors import Predictor
from coreinfer_sim.choosing.prompt_reader import PromptReader
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.choosing.statistics import PromptStatistics
from coreinfer_sim.engines.cache import DEFAULT_BYTES, CompactCache
from coreinfer_sim.engines.compact import Projections, compact_model, grouped_model, install
from coreinfer_sim.engines.compiled import FixedShapes
from coreinfer_sim.engines.lean import decoder as lean
from coreinfer_sim.engines.lean.loops import warm_up_linear
from coreinfer_sim.engines.products import Products
from coreinfer_sim.generation.refresh import TextReader, drifted, parse_refresh
from coreinfer_sim.models.loading import DTYPES
from coreinfer_sim.models.mlps import find_mlps, module_bytes, other_bytes

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
_REFUSED = {
    "assistant_model": "assisted decoding reads drafts of several tokens in one step",
    "custom_generate": "a custom generate loop need not tell prefill from decode",
    "encoder_outputs": "only causal models are supported",
    "inputs_embeds": "routing and statistics read token ids",
}
_REFUSED_SETTINGS = {
    "prompt_lookup_num_tokens": "prompt-lookup decoding reads drafts of several tokens in one step",
    "assistant_early_exit": "early-exit drafts are read several in one step",
    "guidance_scale": "guidance reads a second, unconditional prompt",
}


class SparseModel:
    """Wraps a model; between and after calls the model is its dense self, bit for bit.

    The phase comes from the cache: a forward pass that begins before the end of the prompt is prefill, every later
    one is decode. One-token prompts, chunked prefill and calls that bring a cache along are therefore right.

    Example:
        >>> sparse = SparseModel(model, make_predictor("similarity", find_mlps(model), index), tokenizer)
        >>> sparse.generate(**tokenizer("How do stars form?", return_tensors="pt"), max_new_tokens=64)
    """

    def __init__(
        self,
        model: Any,
        predictor: Predictor,
        tokenizer: Any = None,
        refresh: str | None = None,
        prefill: str = "dense",
        *,
        engine: Engine | str = Engine.AUTO,
        weights: Weights | str = Weights.STORED,
        cache_bytes: int = DEFAULT_BYTES,
        compacts: CompactCache | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: a causal transformers model of a supported family.
            predictor: chooses the neurons; see `make_predictor`.
            tokenizer: turns prompt ids back into text for predictors that route by meaning.
            refresh: derive the selection anew from the text so far: ``every:N`` tokens, or on ``drift``. For stability
                and hybrid mode, one row at a time. It holds a second, dense copy of the cache.
            prefill: ``dense``, or ``sparse``: read the prompt with the kept neurons too, so that dense MLPs are never
                needed. For predictors that know the set before prefill.
            engine: ``lean`` decodes by `LeanDecoder` and raises where it cannot, ``transformers`` by the model's own
                forward code, ``auto`` by the first that can; ``compiled`` by the model's own code through
                `torch.compile` with a static cache, which pays on a GPU. `engine_used` says which it was.
            weights: ``int8`` rounds what decode reads to 8 bits, one scale a row; it needs the lean engine.
            cache_bytes: compact weights of recent selections that are kept for later prompts. A model whose MLPs stay on
                disk keeps one.
            compacts: holds them, in place of a cache of ``cache_bytes``; for several wrappers of one model with the same
                ``weights``.

        Raises:
            ConfigError: ``refresh`` or ``prefill`` cannot be read, or does not go with the predictor; the lean engine was
                asked for and cannot run the model.
            UnsupportedModelError: the family has no adapter.
        """
        if prefill not in ("dense", "sparse"):
            raise ConfigError(f"prefill is {prefill!r}, expected dense or sparse.")
        if prefill == "sparse" and predictor.alpha is not None:
            raise ConfigError(
                f"sparse prefill needs the set before the prompt is read, but {predictor.mode} mode may take it from the "
                "prompt's own activations; choose global, random, or similarity with the fallback global, dense or none."
            )
        self.prefill = prefill
        self.model, self.predictor, self.tokenizer = model, predictor, tokenizer
        self.refresh = None if refresh is None else parse_refresh(refresh, predictor)
        self.layers = find_mlps(model)
        self.selections: list[NeuronSelection] = []
        """What the last call chose, one for each row; after a refresh the newest."""
        self.n_refreshes = 0
        """How often the last call took a new selection after prefill's."""
        self.lookup_seconds = self.swap_seconds = 0.0
        """Of the last call: to choose the neurons before prefill, and to put the compact weights in place."""
        self.swapped_in_decode = False
        """Whether that was after prefill, as it is unless prefill is sparse or the weights lie on disk."""
        self.decode_began: float | None = None
        """When its first pass after prefill began, by `time.perf_counter`; None: there was none."""
        self.engine_used = Engine.TRANSFORMERS
        """What decoded in the last call."""
        self._engine, self._weights = Engine(engine), Weights(weights)
        self.must_be_lean = self._engine is Engine.LEAN or self._weights is Weights.INT8
        """Whether a call that the lean engine cannot serve is an error."""
        self._ends = torch.zeros(0, dtype=torch.int64)
        self._compacts = compacts or CompactCache(cache_bytes)
        self._fixed = FixedShapes(model)
        self._lean = self._make_lean()
        on_cpu = model.device.type == "cpu"
        self._products = Products() if on_cpu and self._engine is not Engine.COMPILED else None
        """Multiplies where the model's own code runs; on a GPU, and when compiled, torch does by itself."""
        if self._products is not None and self._lean is None and model.dtype in DTYPES.values():
            warm_up_linear(model.dtype)  # now, rather than within the first text
        self._lock = _LOCKS.setdefault(model, threading.Lock())

    def _make_lean(self) -> lean.LeanDecoder | None:
        """Return the lean decoder if it can run the model and is wanted."""
        reason = lean.unsupported(self.model)
        if self.refresh is not None:
            reason = reason or "refresh changes the neurons within a text"
            if self._engine is Engine.COMPILED:
                raise ConfigError(f"the compiled engine was asked for, but {reason}; leave the engine at auto.")
        if reason is None and self._weights is Weights.INT8 and self.prefill == "sparse":
            reason = "sparse prefill multiplies weights as they are stored"
        wanted = self._engine in (Engine.AUTO, Engine.LEAN)
        if self.must_be_lean and (reason is not None or not wanted):
            raise ConfigError(
                f"engine {self._engine.value} with {self._weights.value} weights was asked for, but "
                f"{reason or 'int8 weights need the engine lean'}; leave the engine at auto and the weights as stored."
            )
        if reason is not None or not wanted:
            return None
        return lean.LeanDecoder(self.model, self.layers, self._weights is Weights.INT8)

    def __enter__(self) -> SparseModel:
        """Return the wrapper itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the compact weights; the model itself is dense already."""
        self.close()

    def close(self) -> None:
        """Let go of the compact weights."""
        self._compacts.clear()
        self._fixed.release()

    def mlp_bytes(self, selection: NeuronSelection) -> int:
        """Return the MLP bytes that a decoded token reads."""
        if self._weights is Weights.INT8 and self._lean is not None:
            return self._lean.mlp_bytes(selection)
        return selection.mlp_bytes(self.layers)

    @property
    def other_bytes(self) -> int:
        """Weight bytes that a decoded token reads outside the MLPs."""
        if self._weights is Weights.INT8 and self._lean is not None:
            return self._lean.n_bytes
        return other_bytes(self.model, self.layers)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Cut the compact weights of the clusters that prompts route to, ahead of their call; another thread may do so.

        Modes that need the prompt's activations have nothing to prepare.
        """
        engine = Engine.TRANSFORMERS if self._lean is None else Engine.LEAN
        for selection in self.predictor.select(prompts, None, len(prompts)) or ():
            self._compact(selection, engine)

    def generate(
        self, inputs: torch.Tensor | None = None, *, prompts: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate as `transformers`' own ``generate``, decoding sparsely.

        Args:
            inputs: token ids, [n_rows, n_positions], padded on the left; also as ``input_ids``.
            prompts: the text by which each row is routed; None decodes the ids.
            **kwargs: whatever ``model.generate`` takes; rows of unlike clusters may share a batch.

        Raises:
            GenerationError: an option that sparse decode cannot honour, or a call while another one runs.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise GenerationError("generate was given no token ids, expected input_ids of [n_rows, n_positions].")
        self._refuse(kwargs)
        mask = kwargs.get("attention_mask")
        mask = self._mask_of(input_ids, kwargs) if mask is None else mask
        if mask.shape != input_ids.shape:
            raise GenerationError(
                f"the attention mask has the shape {tuple(mask.shape)}, expected that of the ids, {tuple(input_ids.shape)}."
            )
        if not bool(mask[:, -1].all()):
            raise GenerationError("a row ends in padding, expected padding on the left; set padding_side='left'.")
        if not self._lock.acquire(blocking=False):
            raise GenerationError(
                "this model is generating already, and its weights serve one call at a time; wait, or load it twice."
            )
        try:
            return self._generate(input_ids, mask, prompts, kwargs)
        finally:
            self._lock.release()

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        for name, reason in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise GenerationError(f"{name} does not go with sparse decode, as {reason}; leave it out.")
        if self._setting("use_cache", kwargs) is False:
            raise GenerationError(
                "use_cache is False, but sparse decode needs the cache to tell prefill from decode; leave it on."
            )
        for name, reason in _REFUSED_SETTINGS.items():
            value = self._setting(name, kwargs)
            if value is not None and (name != "guidance_scale" or value != 1):
                raise GenerationError(f"{name} does not go with sparse decode, as {reason}; leave it out.")

    def _generate(
        self, input_ids: torch.Tensor, mask: torch.Tensor, prompts: Sequence[str] | None, kwargs: dict[str, Any]
    ) -> Any:
        n_rows = len(input_ids)
        if self.refresh is not None:
            self._refuse_refresh(mask, kwargs)
        if self.predictor.needs_text and prompts is None:
            prompts = self._texts(input_ids, mask)
        if prompts is not None and len(prompts) != n_rows:
            raise GenerationError(f"{len(prompts)} prompts were given for {n_rows} rows of ids, expected one a row.")
        ends = self._setting("eos_token_id", kwargs)
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)
        if self._engine is Engine.COMPILED:
            kwargs = {**kwargs, **self._fixed_shapes(input_ids, kwargs)}
        with self._phases(input_ids.shape[1], mask, prompts):
            return self.model.generate(input_ids, **{**kwargs, "attention_mask": mask})

    def _fixed_shapes(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by which transformers' generate decodes compiled."""
        for name in ("past_key_values", "cache_implementation"):
            if kwargs.get(name) is not None:
                raise GenerationError(f"{name} was given, but the compiled engine brings its own cache; leave it out.")
        n_new = self._setting("max_new_tokens", kwargs)
        n_positions = input_ids.shape[1] + n_new if n_new is not None else self._setting("max_length", kwargs)
        n_copies = max(self._setting(name, kwargs) or 1 for name in ("num_beams", "num_return_sequences"))
        reuse = not self._setting("return_dict_in_generate", kwargs)
        cache = self._fixed.cache(n_copies * len(input_ids), n_positions or input_ids.shape[1] + 20, reuse)
        return {
            "past_key_values": cache,
            "compile_config": self._setting("compile_config", kwargs) or self._fixed.compile_config(),
        }

    def _refuse_refresh(self, mask: torch.Tensor, kwargs: dict[str, Any]) -> None:
        for name, found in (
            ("rows", len(mask)),
            ("num_beams", self._setting("num_beams", kwargs)),
            ("num_return_sequences", self._setting("num_return_sequences", kwargs)),
        ):
            if found is not None and found > 1:
                raise GenerationError(
                    f"refresh follows one text, but {name} is {found}, expected 1; leave refresh out."
                )
        if not bool(mask.all()):
            raise GenerationError(
                "refresh was given a padded row, expected one without padding; leave the padding out."
            )

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """Return what transformers will use: the argument, be it None, else the given config, else the model's own."""
        if name in kwargs:
            return kwargs[name]
        given = kwargs.get("generation_config"), self.model.generation_config
        values = (getattr(config, name, None) for config in given)
        return next((value for value in values if value is not None), None)

    def _mask_of(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Tell padding in the ids as transformers does: by the padding token, unless it also ends texts."""
        pad, eos = (self._setting(name, kwargs) for name in ("pad_token_id", "eos_token_id"))
        ends = eos if isinstance(eos, list) else [eos]
        if pad is None or pad in ends:
            return torch.ones_like(input_ids)
        return input_ids.ne(pad).long()

    def _texts(self, input_ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        if self.tokenizer is None:
            raise GenerationError(
                "this mode routes by the prompt's text; give the wrapper a tokenizer, or prompts=[…]."
            )
        return [
            self.tokenizer.decode(ids[kept.bool()], skip_special_tokens=True)
            for ids, kept in zip(input_ids, mask, strict=True)
        ]

    @contextmanager
    def _phases(self, n_prompt: int, mask: torch.Tensor, prompts: Sequence[str] | None) -> Iterator[None]:
        """Decode sparsely what comes after the prompt, whichever engine does it."""
        call = _Call(self, n_prompt, mask, prompts)
        with ExitStack() as stack:
            stack.callback(call.restore)
            call.begin_prefill()
            if call.reader is not None:
                stack.enter_context(call.reader.reading(self.layers))
            if self._products is not None:
                stack.enter_context(self._products.used_by(self.model))
            hook = self.model.register_forward_pre_hook(call.before_forward, with_kwargs=True)
            try:
                with _forward_of(self.model, call.forward, call.compiled):
                    yield
                call.finish()
            finally:
                hook.remove()

    def _reread(self, text: TextReader, prompts: Sequence[str] | None) -> None:
        """Read the newest tokens densely, and take the selection that follows from all of them if it is time."""
        assert self.refresh is not None
        newest = text.read()
        candidate = self._select(prompts, text.statistics, 1)
        if not self.refresh.on_drift or drifted(self.selections[0], candidate[0], newest):
            self.selections = candidate
            self.n_refreshes += 1

    def _select(
        self, prompts: Sequence[str] | None, statistics: PromptStatistics, n_rows: int
    ) -> list[NeuronSelection]:
        """Return the selections of a predictor that wanted the prompts' statistics."""
        selections = self.predictor.select(prompts, statistics, n_rows)
        assert selections is not None
        return selections

    def _groups(self) -> list[tuple[NeuronSelection, list[int]]]:
        """Return each selection of the current batch with the rows that decode by it."""
        rows: dict[int, list[int]] = {}
        unique: dict[int, NeuronSelection] = {}
        for row, selection in enumerate(self.selections):
            unique.setdefault(id(selection.ids), selection)
            rows.setdefault(id(selection.ids), []).append(row)
        return [(selection, rows[key]) for key, selection in unique.items()]

    def _compact_batch(self) -> dict[int, Projections]:
        """Return the compact MLPs of the current batch as modules, grouped by rows that keep the same neurons."""
        groups = [(self._compact(selection, Engine.TRANSFORMERS), rows) for selection, rows in self._groups()]
        return grouped_model(self.layers, [compact for compact, _ in groups], [rows for _, rows in groups])

    def _compact(self, selection: NeuronSelection, engine: Engine) -> Any:
        """Return a selection's compact MLPs by layer, as the engine takes them, from the cache if they are there."""

        def make() -> dict[int, Any]:
            selection.check(self.layers)
            if self.layers[0].away and len(self.selections) == 1:  # a budget has room for one
                self._compacts.clear()
                give_back_memory()
            if engine is Engine.LEAN:
                assert self._lean is not None
                return self._lean.compact(selection)
            made = compact_model(self.layers, selection)
            if self._products is not None:
                self._products.use(module for parts in made.values() for module in parts.values())
            return made

        def size(made: dict[int, Any]) -> int:
            if engine is Engine.LEAN:
                return sum(mlp.n_bytes for mlp in made.values())
            return sum(module_bytes(module) for parts in made.values() for module in parts.values())

        return self._compacts.get(selection, engine.value, make, size)


class _Call:
    """One call of `SparseModel.generate`: tells prefill from decode, and decodes."""

    def __init__(self, sparse: SparseModel, n_prompt: int, mask: torch.Tensor, prompts: Sequence[str] | None) -> None:
        self._sparse, self._n_prompt, self._mask, self._prompts = sparse, n_prompt, mask, prompts
        sparse.n_refreshes, sparse.swap_seconds, sparse.engine_used = 0, 0.0, Engine.TRANSFORMERS
        sparse.swapped_in_decode, sparse.decode_began = True, None
        begin = time.perf_counter()
        known = sparse.predictor.select(prompts, None, len(mask))
        sparse.lookup_seconds = time.perf_counter() - begin
        self.reader: PromptReader | None = None
        """Reads the prompt's activations, if the predictor needs them."""
        if known is None:
            assert sparse.predictor.alpha is not None
            self.reader = PromptReader(mask, sparse.predictor.alpha)
        else:
            sparse.selections = known
        self._decoding = False
        self._is_compiled = sparse._engine is Engine.COMPILED
        self._dense: dict[int, Projections] = {}
        self._fetched: list[tuple[Any, list[int]]] = []
        """Compact MLPs that sparse prefill has put in place, which cannot be cut again before they are taken out."""
        self._text: TextReader | None = None
        self._lean_rows: list[tuple[list[int], dict[int, lean.NeuronMLP]]] | None = None
        self._finished = np.zeros(0, bool)
        self._starts = np.zeros(0, np.int64)

    def begin_prefill(self) -> None:
        """Fetch weights that are away, so that decode follows prefill at once; put them in place if prefill is sparse."""
        sparse = self._sparse
        if self.reader is not None or (sparse.prefill == "dense" and not sparse.layers[0].away):
            return
        begin, sparse.swapped_in_decode = time.perf_counter(), False
        engine = Engine.TRANSFORMERS if sparse._lean is None else Engine.LEAN
        groups = [(sparse._compact(each, engine), rows) for each, rows in sparse._groups()]
        if sparse.prefill == "sparse":
            self._fetched = groups
            modules = [lean.modules(sparse.layers, c) if engine is Engine.LEAN else c for c, _ in groups]
            compacts = grouped_model(sparse.layers, modules, [rows for _, rows in groups])
            self._dense = install(sparse.layers, self._in_place(compacts))
        sparse.swap_seconds = time.perf_counter() - begin

    def before_forward(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each pass: read the prompt's activations in prefill, put the compact MLPs in place for decode."""
        sparse, text = self._sparse, self._text
        if self._decoding and text is None:
            return  # nothing is asked of the cache, as the answer of one on a GPU would have to be waited for
        if text is not None and text.reading:
            return
        cache = kwargs.get("past_key_values")
        n_past = int(cache.get_seq_length()) if cache is not None else 0
        if n_past < self._n_prompt:
            if self.reader is not None:
                self.reader.begin(kwargs["input_ids"], n_past)
        elif not self._decoding:
            self._begin_decode(cache, kwargs)
        refresh = sparse.refresh
        if self._text is not None and refresh is not None and self._text.add(kwargs["input_ids"]) == refresh.n_tokens:
            install(sparse.layers, self._dense)
            sparse._reread(self._text, self._prompts)
            install(sparse.layers, sparse._compact_batch())

    def _begin_decode(self, cache: Any, kwargs: dict[str, Any]) -> None:
        self._decoding = True
        sparse = self._sparse
        sparse.decode_began = time.perf_counter()
        if self.reader is not None:
            self.reader.pause()
            sparse.selections = sparse._select(self._prompts, self.reader.statistics, len(self._mask))
            if sparse.refresh is not None:
                alpha = self.reader.alpha
                self._text = TextReader(sparse.model, sparse.layers, cache, alpha, self.reader.statistics)
        reason = self._not_lean(cache, kwargs)
        begin = time.perf_counter()
        if reason is None:
            sparse.engine_used = Engine.LEAN
            n_copies = len(kwargs["input_ids"]) // len(self._mask)  # beams, or several texts of one prompt
            groups = self._fetched or [(sparse._compact(each, Engine.LEAN), rows) for each, rows in sparse._groups()]
            self._lean_rows = [
                ([row * n_copies + i for row in rows for i in range(n_copies)], compact) for compact, rows in groups
            ]
            self._starts = self._mask.long().argmax(1).repeat_interleave(n_copies).cpu().numpy()
            self._finished = np.zeros(len(self._starts), bool)
        else:
            if sparse.must_be_lean:
                raise GenerationError(f"the lean engine was asked for, but {reason}; leave the engine at auto.")
            if not self._dense:  # else sparse prefill has put them there
                self._dense = install(sparse.layers, self._in_place(sparse._compact_batch()))
            if sparse._products is not None:
                sparse._products.choose(sparse.model.modules(), len(kwargs["input_ids"]))
        sparse.swap_seconds += time.perf_counter() - begin

    def _not_lean(self, cache: Any, kwargs: dict[str, Any]) -> str | None:
        """Return why the lean engine cannot decode in this call, or None if it can."""
        if self._sparse._lean is None:
            return "it cannot run this model"
        if not lean.takes(cache):
            return f"the cache is a {type(cache).__name__} that does not grow with the text in every layer"
        if bool((self._mask.long().diff(dim=1) < 0).any()):
            return "the attention mask has gaps"
        if any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states")):
            return "attentions or hidden states were asked for"
        return None

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's own forward code: in decode with the lean engine it is not called."""
        if self._lean_rows is None:
            return original(*args, **kwargs)
        decoder = self._sparse._lean
        assert decoder is not None
        input_ids, cache = kwargs["input_ids"], kwargs["past_key_values"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), int(cache.get_seq_length()))
        if len(input_ids) == len(self._mask):  # among the beams of a prompt rows change places
            self._finished |= torch.isin(input_ids[:, -1], self._sparse._ends).numpy()
        groups = [([row for row in rows if not self._finished[row]], mlps) for rows, mlps in self._lean_rows]
        positions = positions.reshape(-1).expand(len(input_ids))
        logits = decoder.step(input_ids, cache, positions, self._starts, [group for group in groups if group[0]])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def compiled(self, original: Callable[..., Any], config: Any) -> Callable[..., Any]:
        """Return what transformers decodes with where it would compile: the bare forward code, without our hooks."""

        def step(*args: Any, **kwargs: Any) -> Any:
            self._is_compiled = True
            self.before_forward(self._sparse.model, args, kwargs)
            self._sparse.engine_used = Engine.COMPILED
            return self._sparse._fixed.call(original, config)(*args, **kwargs)

        return step

    def _in_place(self, compacts: dict[int, Projections]) -> dict[int, Projections]:
        return self._sparse._fixed.placed(compacts) if self._is_compiled else compacts

    def finish(self) -> None:
        """At the end: where nothing was decoded, the choice is still of interest."""
        if self.reader is not None and not self._decoding:
            self._sparse.selections = self._sparse._select(self._prompts, self.reader.statistics, len(self._mask))

    def restore(self) -> None:
        """Leave the model dense."""
        install(self._sparse.layers, self._dense)
        if self._sparse._lean is not None:
            self._sparse._lean.release()


@contextmanager
def _forward_of(
    model: Any, forward: Callable[..., Any], compiled: Callable[[Callable[..., Any], Any], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block let calls of the model go through ``forward(original, …)``, and compiled ones through ``compiled``."""
    original, own = model.forward, vars(model).get("forward")

    @functools.wraps(original)
    def through(*args: Any, **kwargs: Any) -> Any:
        return forward(original, *args, **kwargs)

    model.forward = through
    model.get_compiled_call = functools.partial(compiled, original)
    try:
        yield
    finally:
        del model.get_compiled_call
        if own is None:
            del model.forward
        else:
            model.forward = own
