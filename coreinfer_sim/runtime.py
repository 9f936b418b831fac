"""SparseModel: a loaded transformers model whose `generate` prefills densely and decodes sparsely."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from coreinfer_sim.activations import ActivationTap, recorded_activations
from coreinfer_sim.architectures import MLPLayer, find_mlps
from coreinfer_sim.core_neurons import SentenceStatistics, sentence_statistics
from coreinfer_sim.errors import ConfigError, GenerationError
from coreinfer_sim.memory import give_back_memory
from coreinfer_sim.predictors import Predictor, PromptStatistics
from coreinfer_sim.refresh import TextReader, drifted, parse_refresh
from coreinfer_sim.selection import NeuronSelection
from coreinfer_sim.sparse_mlp import Projections, compact_model, grouped_model, install

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
_N_LATEST = 4
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

        Raises:
            ConfigError: ``refresh`` or ``prefill`` cannot be read, or does not go with the predictor.
            UnsupportedModelError: the family has no adapter.
        """
        if prefill not in ("dense", "sparse"):
            raise ConfigError(f"prefill is {prefill!r}, expected dense or sparse.")
        if prefill == "sparse" and predictor.alpha is not None:
            raise ConfigError(
                f"sparse prefill needs the set before the prompt is read, but {predictor.mode} mode may take it from the "
                "prompt's own activations; choose similarity with another fallback than hybrid, global or random."
            )
        self.prefill = prefill
        self.model, self.predictor, self.tokenizer = model, predictor, tokenizer
        self.refresh = None if refresh is None else parse_refresh(refresh, predictor)
        self.layers = find_mlps(model)
        self.selections: list[NeuronSelection] = []
        """What the last call chose, one for each row; after a refresh the newest."""
        self.n_refreshes = 0
        """How often the last call took a new selection after prefill's."""
        self._latest: OrderedDict[int, tuple[NeuronSelection, dict[int, Projections]]] = OrderedDict()
        self._lock = _LOCKS.setdefault(model, threading.Lock())

    def __enter__(self) -> SparseModel:
        """Return the wrapper itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the compact weights; the model itself is dense already."""
        self.close()

    def close(self) -> None:
        """Let go of the compact weights."""
        self._latest.clear()

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
        with self._phases(input_ids.shape[1], mask, prompts):
            return self.model.generate(input_ids, **{**kwargs, "attention_mask": mask})

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
        """Return what transformers will use: the argument, else the given config, else the model's own."""
        given = kwargs.get("generation_config"), self.model.generation_config
        values = (kwargs.get(name), *(getattr(config, name, None) for config in given))
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
        """Hold the compact MLPs in the model during decode, and the dense ones otherwise."""
        n_rows = len(mask)
        known = self.predictor.select(prompts, None, n_rows)
        reader = None
        if known is None:
            assert self.predictor.alpha is not None
            reader = _PromptReader(mask, self.predictor.alpha)
        else:
            self.selections = known
        dense: dict[int, Projections] | None = None
        text: TextReader | None = None
        self.n_refreshes = 0

        def before_forward(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal dense, text
            if text is not None and text.reading:
                return
            cache = kwargs.get("past_key_values")
            n_past = int(cache.get_seq_length()) if cache is not None else 0
            if n_past < n_prompt:
                if reader is not None:
                    reader.begin(kwargs["input_ids"], n_past)
            elif dense is None:
                if reader is not None:
                    reader.pause()
                    self.selections = self._select(prompts, reader.statistics, n_rows)
                    if self.refresh is not None:
                        text = TextReader(self.model, self.layers, cache, reader.alpha, reader.statistics)
                dense = install(self.layers, self._compact_batch())
            if text is not None and self.refresh is not None and text.add(kwargs["input_ids"]) == self.refresh.n_tokens:
                assert dense is not None
                install(self.layers, dense)
                self._reread(text, prompts)
                install(self.layers, self._compact_batch())

        if known is not None and (self.prefill == "sparse" or self.layers[0].store is not None):
            compact = self._compact_batch()  # from the disk before prefill, which is then followed by decode at once
            dense = install(self.layers, compact) if self.prefill == "sparse" else None
        with reader.reading(self.layers) if reader is not None else nullcontext():
            hook = self.model.register_forward_pre_hook(before_forward, with_kwargs=True)
            try:
                yield
                if reader is not None and dense is None:  # nothing was decoded, but the choice is of interest
                    self.selections = self._select(prompts, reader.statistics, n_rows)
            finally:
                hook.remove()
                if dense is not None:
                    install(self.layers, dense)

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

    def _compact_batch(self) -> dict[int, Projections]:
        """Return the compact MLPs of the current batch, grouped by rows that keep the same neurons."""
        rows: dict[int, list[int]] = {}
        unique: dict[int, NeuronSelection] = {}
        for row, selection in enumerate(self.selections):
            unique.setdefault(id(selection.ids), selection)
            rows.setdefault(id(selection.ids), []).append(row)
        return grouped_model(self.layers, [self._compact(each) for each in unique.values()], list(rows.values()))

    def _compact(self, selection: NeuronSelection) -> dict[int, Projections]:
        """Return a selection's compact MLPs; those of the latest selections are kept for the next call."""
        key = id(selection.ids)
        if key not in self._latest:
            selection.check(self.layers)
            if self.layers[0].store is not None and len(self.selections) == 1:  # a budget has room for one
                self._latest.clear()
                give_back_memory()
            self._latest[key] = (selection, compact_model(self.layers, selection))
        self._latest.move_to_end(key)
        if len(self._latest) > _N_LATEST:
            self._latest.popitem(last=False)
        return self._latest[key][1]


class _PromptReader:
    """Sums up the prompt's own activations over the passes of prefill."""

    def __init__(self, mask: torch.Tensor, alpha: float) -> None:
        self._mask, self.alpha = mask.cpu(), alpha
        self._starts = np.zeros(1, np.int64)
        self._n_beams = 1
        self._tap: ActivationTap | None = None
        self.statistics: PromptStatistics = {}

    @contextmanager
    def reading(self, layers: Sequence[MLPLayer]) -> Iterator[None]:
        """Read the activation site of every pass in the block that `begin` announced."""
        with recorded_activations(layers, self._add) as self._tap:
            yield

    def begin(self, input_ids: torch.Tensor, n_past: int) -> None:
        """Announce a pass over ``input_ids`` [n_rows · n_beams, n_positions] after ``n_past`` positions."""
        assert self._tap is not None
        self._n_beams = len(input_ids) // len(self._mask)
        mask = self._mask[:, n_past : n_past + input_ids.shape[1]].repeat_interleave(self._n_beams, 0)
        self._starts = np.concatenate([[0], np.cumsum(mask.sum(1).numpy())])
        self._tap.set_mask(mask)

    def pause(self) -> None:
        """Read nothing more: decode has begun."""
        assert self._tap is not None
        self._tap.pause()

    def _add(self, layer: int, z: torch.Tensor) -> None:
        every = sentence_statistics(z, self._starts, self.alpha)
        step = self._n_beams  # all beams of a prompt have read the same
        own = SentenceStatistics(every.counts[::step], every.energy[::step], every.activation[::step])
        self.statistics[layer] = self.statistics[layer] + own if layer in self.statistics else own
