"""SparseModel: a loaded transformers model whose `generate` prefills densely and decodes sparsely."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coreinfer_sim.base.decode_settings import DecodeConfig, Prefill, with_settings
from coreinfer_sim.base.errors import ConfigError, GenerationError
from coreinfer_sim.choosing.predictors import Predictor, ReadingPredictor
from coreinfer_sim.engines.calibration import calibrate
from coreinfer_sim.engines.face import Engine
from coreinfer_sim.engines.registry import choose_engines
from coreinfer_sim.generation.phases import CallFacts, PhasedCall
from coreinfer_sim.generation.prefix_cache import PrefixCache
from coreinfer_sim.generation.refusals import CallSettings, check_ids
from coreinfer_sim.generation.routing import routing_text_of_ids
from coreinfer_sim.generation.streaming import Watch
from coreinfer_sim.generation.turns import Turns
from coreinfer_sim.models.mending import outside
from coreinfer_sim.models.mlps import find_mlps

_CACHES = ("past_key_values", "cache_implementation")
"""Arguments of ``generate`` that say what holds keys and values."""
_TURNS: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()


class SparseModel:
    """Wraps a model; between and after calls the model is its dense self, bit for bit.

    Example:
        >>> sparse = SparseModel(model, make_predictor("similarity", find_mlps(model), index), tokenizer)
        >>> sparse.generate(**tokenizer("How do stars form?", return_tensors="pt"), max_new_tokens=64)
    """

    def __init__(
        self,
        model: Any,
        predictor: Predictor,
        tokenizer: Any = None,
        config: DecodeConfig | None = None,
        *,
        engines: Sequence[Engine] | None = None,
        prefixes: PrefixCache | None = None,
        **settings: Any,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: a causal transformers model of a supported family.
            predictor: chooses the neurons; see `make_predictor`.
            tokenizer: turns prompt ids back into text for predictors that route by meaning.
            config: what decodes.
            engines: of another wrapper of the same model with the same settings, to share prepared weights with it.
            prefixes: where texts of one row are kept for prompts that begin as they do; None: each is read as a whole.
            **settings: further fields of `DecodeConfig`, such as ``engine="lean"``.

        Raises:
            ConfigError: settings that contradict each other or the predictor, or an engine that cannot run the model.
            UnsupportedModelError: the family has no adapter.
        """
        self.config: DecodeConfig = with_settings(settings, (config or DecodeConfig(),))[0]
        if self.config.prefill is Prefill.SPARSE and predictor.alpha is not None:
            raise ConfigError(
                f"sparse prefill needs the set before the prompt is read, but {predictor.mode} mode may take it from the "
                "prompt's own activations; choose global, random, or similarity with the fallback global, dense or none."
            )
        self.model, self.predictor, self.tokenizer = model, predictor, tokenizer
        self.layers = find_mlps(model)
        self.engines: Sequence[Engine] = engines or ()
        """That may decode, best first; see `choose_engines`."""
        self.refused: str | None = None
        """Why an engine that ``auto`` prefers cannot run the model."""
        if not self.engines:
            self.engines, self.refused = choose_engines(model, self.layers, self.config)
        if isinstance(predictor, ReadingPredictor) and tokenizer is not None:
            known = None if predictor.index is None else predictor.index.histograms
            calibrate(self.engines[0], tokenizer, known=known)
        self._prefixes = prefixes
        self.latest = CallFacts()
        """What the latest call chose and cost."""
        self.turns = _TURNS.setdefault(model, Turns())
        """Who has the model, of all wrappers of it."""

    def __enter__(self) -> SparseModel:
        """Return the wrapper itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the prepared weights; the model itself is dense already."""
        self.close()

    def close(self) -> None:
        """Let go of the prepared weights."""
        for engine in self.engines:
            engine.close()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Prepare the weights of the clusters that prompts route to, ahead of their call; another thread may do so.

        Modes that need the prompt's activations have nothing to prepare.
        """
        selections = self.predictor.select(prompts, None, len(prompts)) or []
        self.engines[0].prepare(selections)

    def generate(
        self, inputs: torch.Tensor | None = None, *, prompts: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate as `transformers`' own ``generate``, decoding sparsely.

        Args:
            inputs: token ids, [n_rows, n_positions], padded on the left; also as ``input_ids``.
            prompts: the text by which each row is routed; None decodes the ids, of which a conversation in the tokenizer's
                chat template is routed as its messages are.
            **kwargs: whatever ``model.generate`` takes; rows of unlike clusters may share a batch.

        Raises:
            GenerationError: an option that sparse decode cannot honour, or a call while another one runs.
        """
        input_ids: Any = inputs if inputs is not None else kwargs.pop("input_ids", None)
        with self.held():
            self.latest = CallFacts()
            output, self.latest = self._checked(input_ids, prompts, None, kwargs)
        return output

    def generate_beside_others(
        self, input_ids: torch.Tensor, prompts: Sequence[str] | None, watch: Watch | None = None, **kwargs: Any
    ) -> tuple[Any, CallFacts]:
        """Generate as `generate` does, in a block of `Turns.call`; return also what the call chose and cost.

        ``watch`` receives which neurons the tokens of the first row read.
        """
        return self._checked(input_ids, prompts, self.turns, kwargs, watch)

    def _checked(
        self,
        input_ids: Any,
        prompts: Sequence[str] | None,
        turns: Turns | None,
        kwargs: dict[str, Any],
        watch: Watch | None = None,
    ) -> tuple[Any, CallFacts]:
        check_ids(input_ids, None)
        settings = CallSettings(self.model, kwargs)
        settings.refuse()
        mask = kwargs.get("attention_mask")
        mask = settings.mask_of(input_ids) if mask is None else mask
        check_ids(input_ids, mask, self._n_rows)
        return self._generate(input_ids, mask, prompts, settings, turns, watch, kwargs)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other calls from the model's weights within the block, or raise GenerationError if one is running."""
        with self.turns.alone() as is_free:
            if not is_free:
                raise GenerationError(
                    "this model is generating already, and its weights serve one call at a time; wait, or load it twice."
                )
            yield

    def _generate(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        prompts: Sequence[str] | None,
        settings: CallSettings,
        turns: Turns | None,
        watch: Watch | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, CallFacts]:
        # 1) what routes each row
        if self.predictor.needs_text and prompts is None:
            prompts = self._texts(input_ids, mask)
        if prompts is not None and len(prompts) != len(input_ids):
            raise GenerationError(
                f"{len(prompts)} prompts were given for {len(input_ids)} rows of ids, expected one a row."
            )
        # 2) what the engine adds to the call, and what the model's own settings shall not decide
        n_copies = max(settings.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        added = self._engine_options(input_ids, n_copies, settings, kwargs)
        kwargs = {
            **added,
            **kwargs,
            "attention_mask": mask,
            "use_cache": True,
        }
        padding = self._padding(settings)
        if settings.get("pad_token_id") not in (None, padding):
            kwargs["pad_token_id"] = padding
        input_ids = input_ids.masked_fill(outside(input_ids, self._n_rows), padding)
        # 3) prefill and decode
        ends = settings.get("eos_token_id")
        end_ids = torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)
        chunked = settings.get("prefill_chunk_size") is not None
        call = PhasedCall(self.model, self.engines, self.predictor, mask, prompts, end_ids, chunked, turns, watch)
        prefixes = self._prefixes if n_copies * len(input_ids) == 1 and bool(mask.all()) else None
        if any(kwargs.get(name) is not None for name in _CACHES):  # the call's, or the engine's own
            prefixes = None
        read = input_ids[0]
        if prefixes is not None and (known := call.known(prefixes, read)) is not None:
            kwargs["past_key_values"] = known
        try:
            with call.running():
                output = self.model.generate(input_ids, **kwargs)
                read = getattr(output, "sequences", output)[0]
                call.finish()
                facts = call.facts
        finally:  # what was read of a text that is broken off is worth keeping, too
            if prefixes is not None:
                call.keep(prefixes, read, input_ids.shape[1])
        return output, facts

    def _engine_options(
        self, input_ids: torch.Tensor, n_copies: int, settings: CallSettings, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        n_new = settings.get("max_new_tokens")
        n_positions = input_ids.shape[1] + n_new if n_new is not None else settings.get("max_length")
        added = self.engines[0].generate_options(
            n_copies * len(input_ids),
            n_positions or input_ids.shape[1] + 20,
            reuse=not settings.get("return_dict_in_generate"),
        )
        for name in _CACHES:
            if "past_key_values" in added and kwargs.get(name) is not None:
                raise GenerationError(
                    f"{name} was given, but the {self.engines[0].name} engine brings its own cache; leave it out."
                )
        return {name: value for name, value in added.items() if settings.get(name) is None}

    @property
    def _n_rows(self) -> int:
        """Rows of the embedding table."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _padding(self, settings: CallSettings) -> int:
        """Return an id that can pad: the call's padding or end, where it has a row in the table."""
        pad, ends = settings.get("pad_token_id"), settings.get("eos_token_id")
        ids = [pad, *(ends if isinstance(ends, list) else [ends])]
        return next((each for each in ids if each is not None and 0 <= each < self._n_rows), 0)

    def _texts(self, input_ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        if self.tokenizer is None:
            raise GenerationError(
                "this mode routes by the prompt's text; give the wrapper a tokenizer, or prompts=[…]."
            )
        index = getattr(self.predictor, "index", None)
        return [
            routing_text_of_ids(index, ids[kept.bool()], self.tokenizer)
            for ids, kept in zip(input_ids, mask, strict=True)
        ]
