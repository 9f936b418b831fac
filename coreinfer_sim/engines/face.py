"""The face of every engine: generation, evaluation, bench and serving speak to nothing else.

An engine decides how held neurons are laid out, read and multiplied. To add one, derive from `Engine`, implement `refuses`,
`cut`, `step` and `forced`, and hand the class to `registry.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch

from coreinfer_sim.base.decode_settings import DecodeConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.progress import Progress
from coreinfer_sim.choosing.selection import NeuronSelection
from coreinfer_sim.engines.prepared import Prepared, PreparedCache
from coreinfer_sim.engines.sizes import Bytes, BytesRead, Planner
from coreinfer_sim.engines.steps import CallState, Group, SharesSteps, StepInputs
from coreinfer_sim.models.loading import LanguageModel
from coreinfer_sim.models.mlps import MLPLayer


class Engine(ABC):
    """Decodes one model with the neurons of any selection; one call at a time, or several that share steps."""

    name: ClassVar[str]
    """What users call it."""
    skips_finished: ClassVar[bool] = False
    """Whether rows that have ended cost nothing, so that it is worth finding them out at each step."""
    reads_by_token: ClassVar[bool] = False
    """Whether tokens may read a share of what is held; see `NeuronSelection.read_ratio`."""

    def __init__(self, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> None:
        """Decode ``model``, whose MLPs are ``layers``, in a way that `refuses` has nothing against."""
        self.model, self.layers, self.config = model, layers, config
        self.cache = PreparedCache(config.cache_bytes)
        """Prepared weights of recent selections."""
        self.call = self.new_call()
        """What belongs to the call that runs; who lets calls take turns puts each one's own back."""

    @classmethod
    @abstractmethod
    def refuses(cls, model: Any, config: DecodeConfig) -> str | None:
        """Return why a model cannot be decoded under these settings, or None if it can."""

    def new_call(self) -> CallState:
        """Return what a call begins with."""
        return CallState()

    @property
    def sharing(self) -> SharesSteps | None:
        """What does the steps of several calls together, for less than each by itself; None: calls follow one another."""
        return None

    @property
    def skips_zeros(self) -> bool:
        """Whether neurons that are zero are not read, though nothing says that tokens read a share: nothing is left out."""
        return False

    @property
    def reads_as_prefill(self) -> bool:
        """Whether decode multiplies by the same weights as prefill, so that it writes the same keys and values."""
        return True

    def refuses_call(self, cache: Any, mask: torch.Tensor, given: Mapping[str, Any]) -> str | None:
        """Return why decode cannot go on from this cache in this call, or None if it can.

        Args:
            cache: as prefill has left it.
            mask: of the prompt, [n_prompts, n_positions].
            given: what transformers' ``generate`` gives to the first decode step.
        """
        return None

    @classmethod
    def plan(cls, neuron_bytes: float, n_held: Sequence[int], config: DecodeConfig) -> Bytes:
        """Return what the MLPs will take, from the bytes of one neuron and the neurons that each layer holds."""
        n_bytes = round(sum(n_held) * neuron_bytes)
        return Bytes(n_bytes, n_bytes)

    def calibrate(
        self,
        passages: Callable[[], Sequence[torch.Tensor]],
        progress: Progress | None = None,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Measure what reading by token needs, unless that was done before.

        Args:
            passages: returns the token ids of texts, [n_tokens] each.
            progress: receives what is done.
            known: what `histograms` has returned for some layouts, which is taken in place of passages where it fits.
        """
        return None

    def histograms(
        self, texts: Sequence[tuple[torch.Tensor, int]], report: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Measure what reading by token needs, on texts of a corpus, for an index to keep.

        Args:
            texts: token ids [n_tokens], and how many of them stand before those that count: the prompt.
            report: takes how many more texts are done.

        Returns:
            Counts by the name of the layout, int64 [n_layers, n_bins]; empty if the engine reads no share of neurons.
        """
        return {}

    def values_by_token(
        self,
        texts: Sequence[tuple[torch.Tensor, int]],
        read_ratio: float,
        numbers: Container[int],
        take: Callable[[int, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Give what neurons that tokens read come to, on texts that are read densely, by an engine that was calibrated.

        Args:
            texts: as for `histograms`.
            read_ratio: share of d_ff that a token reads.
            numbers: of the layers that count.
            take: for each text and layer its number, the values of its neurons, 0 where they are not read [n_tokens, d_ff],
                and what all neurons give [n_tokens, d_model].

        Raises:
            ConfigError: the engine reads no share of neurons.
        """
        self.check_by_token()

    @classmethod
    def warm_up(cls, model: Any) -> None:
        """Compile what decode needs for a model, which may have no weights yet, ahead of the first text."""
        return None

    @classmethod
    def load(
        cls, name: str, config: DecodeConfig, by_token: bool = False, progress: Progress | None = None
    ) -> LanguageModel | None:
        """Load a model in the engine's own layout, which is kept in the user's cache folder.

        Args:
            name: as `load_model` takes it.
            config: what decodes.
            by_token: whether tokens will read a share of the neurons.
            progress: receives what is done.

        Returns:
            None: the engine reads weights as transformers loads them, or does not decode such a model.
        """
        return None

    def take_over(self) -> None:
        """Let go of weights of the model that the engine holds in another layout: no weight stays in memory twice.

        From then on the model's own forward code multiplies by the engine's. To be called where nobody else uses the model.
        """
        return None

    @classmethod
    def load_within(
        cls, name: str, config: DecodeConfig, planner: Planner, progress: Progress | None = None
    ) -> LanguageModel | None:
        """Load a model of which each token reads the neurons that it chooses from the disk, but for those in memory.

        Args:
            name: of a local checkpoint folder.
            config: what decodes.
            planner: called before any weights are loaded; what it raises is passed on.
            progress: receives what is done.

        Returns:
            None: the engine does not decode such a model in this way.

        Raises:
            ConfigError: a type of weights or a system for which there is no such way.
        """
        return None

    @abstractmethod
    def cut(self, selection: NeuronSelection) -> Mapping[int, Any]:
        """Lay out the held neurons of a selection that fits the model, by layer."""

    @abstractmethod
    def size(self, layers: Mapping[int, Any]) -> int:
        """Return the bytes of what `cut` has made."""

    def prepare(self, selections: Sequence[NeuronSelection]) -> list[Prepared]:
        """Return the held neurons of a batch's selections, from the cache where they are there."""
        if len(selections) == 1 and self.layers[0].away:  # a memory budget has room for one
            self.cache.keep_only(selections[0])

        def make(selection: NeuronSelection) -> Prepared:
            selection.check(self.layers)
            if selection.read_ratio < 1:
                self.check_by_token()
            made = self.cut(selection)
            n_bytes, layers = self.size(made), self.layers
            passed = sum((1 - layers[n].share) * self.size({n: made[n]}) for n in made if layers[n].share < 1)
            return Prepared(selection, made, n_bytes, n_bytes - round(passed))

        return [self.cache.get(selection, make) for selection in selections]

    @classmethod
    def is_faster_by_token(cls, layout: str) -> bool:
        """Return whether tokens that choose among rows of a layout decode faster than dense ones on processors of this kind."""
        return False

    @classmethod
    def layout_by_token(cls, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> str:
        """Return what the rows would be that tokens choose among."""
        return ""

    @classmethod
    def is_sparse_by_itself(cls, model: Any, layers: Sequence[MLPLayer], config: DecodeConfig) -> bool:
        """Return whether dense decode of a model will skip neurons that are zero, so that nothing has to be estimated."""
        return False

    def check_by_token(self) -> None:
        """Raise ConfigError unless tokens may read a share of what is held."""
        if not self.reads_by_token:
            raise ConfigError(
                f"a read ratio below 1 was asked for, but the engine {self.name} reads all held neurons; leave it out, or "
                "use the engine lean, with a model that it decodes."
            )

    @abstractmethod
    def mounted(self, groups: Sequence[Group]) -> AbstractContextManager[None]:
        """Let the model's own forward pass use the held neurons within the block: sparse prefill."""

    def running(self) -> AbstractContextManager[None]:
        """Surround a call of the model's ``generate`` or forward pass, prefill included."""
        return nullcontext()

    @property
    def pass_tokens(self) -> int | None:
        """Tokens, of all rows together, that one pass of prefill reads at most; None: the whole prompt."""
        return None

    def generate_options(self, n_sequences: int, n_positions: int, reuse: bool) -> dict[str, Any]:
        """Return what transformers' ``generate`` needs besides.

        Args:
            n_sequences: rows times beams.
            n_positions: prompt and new tokens.
            reuse: whether a cache of an earlier call may be used again.
        """
        return {}

    def compiled(self, forward: Callable[..., Any], config: Any) -> Callable[..., Any]:
        """Return what is called in place of the model's forward pass where transformers would compile it."""
        return forward

    @abstractmethod
    def step(self, inputs: StepInputs, groups: Sequence[Group]) -> Any:
        """Decode one token in every row.

        Returns:
            transformers' ``CausalLMOutputWithPast``, with float logits [n_rows, 1, vocabulary]. Call `count` once.
        """

    @abstractmethod
    def forced(self, ids: torch.Tensor, cache: Any, prepared: Prepared) -> torch.Tensor:
        """Feed the tokens of a given text as decode would have read them, many positions at a time.

        Args:
            ids: [1, n_tokens].
            cache: of the prompt, one row; it is left as it was. None: no prompt.
            prepared: held neurons.

        Returns:
            Logits as those of single steps, float32 [n_tokens, vocabulary].
        """

    @abstractmethod
    def other_bytes(self) -> int:
        """Return the bytes of weights that a step reads outside the MLPs."""

    def dense_bytes(self, layer: MLPLayer) -> int:
        """Return the bytes that a step reads in a layer that stays dense; of an expert, on average over its layer's."""
        return round(layer.n_bytes * layer.share)

    def whole_bytes(self) -> int:
        """Return the MLP bytes that a dense step reads."""
        return sum(layer.n_bytes if layer.away else self.dense_bytes(layer) for layer in self.layers)

    def mlp_bytes(self, held: Sequence[Prepared]) -> int:
        """Return the MLP bytes that a step reads; a layer that several selections leave dense is read once."""
        dense = [layer for layer in self.layers if any(layer.number not in each.layers for each in held)]
        return sum(each.n_read for each in held) + sum(self.dense_bytes(layer) for layer in dense)

    def count(self, groups: Sequence[Group], n_steps: int = 1) -> None:
        """Count the bytes of steps that have been done."""
        held = [prepared for _, prepared in groups]
        shares = [len(rows) * each.selection.keep_ratio(self.layers) for rows, each in groups]
        share = sum(shares) / max(1, sum(len(rows) for rows, _ in groups))
        self.count_read(groups, self.mlp_bytes(held) * n_steps, share * n_steps, n_steps)

    def count_read(self, groups: Sequence[Group], mlp: int, share: float, n_steps: int) -> None:
        """Count steps that have read so many MLP bytes and such a share of all neurons in full, both summed over steps."""
        self.call.latest = groups
        self.call.read += BytesRead(mlp, self.other_bytes() * n_steps, n_steps, share)

    def read(self) -> BytesRead:
        """Return what was read since the latest `release`."""
        return self.call.read

    def neurons_read(self) -> list[dict[int, torch.Tensor]]:
        """Return the ids that the latest step read in full, by group and layer; layers that are not named were read whole.

        Where tokens choose among what is held, their choice counts if the call is ``watched``.
        """
        found = []
        for _, prepared in self.call.latest:
            ids = dict(prepared.selection.ids)
            for number, rows in self.call.chosen.get(id(prepared), {}).items():
                places = torch.from_numpy(np.flatnonzero(rows.any(axis=0)))
                ids[number] = ids[number][places] if number in ids else places
            found.append(ids)
        return found

    def release(self) -> None:
        """Let go of what belongs to the latest call, and begin to count anew."""
        self.call = self.new_call()

    def close(self) -> None:
        """Let go of all prepared weights."""
        self.release()
        self.cache.clear()
