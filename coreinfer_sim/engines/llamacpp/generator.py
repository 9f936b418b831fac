"""Generation on llama.cpp: exported sets run in this process through xllamacpp, each prompt on the one that it routes to.

A dense prefill is handed over: the dense model reads the prompt, its cache is saved, and the cluster's model, whose cache
has the same shape, goes on from there. So the phases are those of `SparseModel`: the prompt is read densely and gives the
first token; every later one is decoded sparsely.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coreinfer_sim.base.errors import ConfigError, GenerationError, ModelError, PromptError
from coreinfer_sim.base.progress import readable_size
from coreinfer_sim.base.settings import UNFAMILIAR, Fallback
from coreinfer_sim.engines.llamacpp.server import LlamaServer
from coreinfer_sim.export.compact import DENSE, GLOBAL
from coreinfer_sim.export.exporting import ROUTER_FILE
from coreinfer_sim.index.clusters import Match
from coreinfer_sim.index.index import SemanticIndex
from coreinfer_sim.models.prompts import Message, last_user_message, within

_SLOT = "prompt.bin"


@dataclass(frozen=True)
class LlamaCppGeneration:
    """What one prompt gave and cost."""

    prompt: str
    text: str
    """The new text, without the prompt."""
    n_new_tokens: int
    ended: bool
    """Whether the text came to its end, rather than to the limit of new tokens."""
    model: str
    """File that decoded."""
    mode: str
    """similarity, global or dense."""
    cluster: int | None
    label: str | None
    similarity: float | None
    confidence: float | None
    n_prompt_tokens: int
    prefill: str
    """dense or sparse."""
    lookup_seconds: float
    load_seconds: float
    """To open files that were not open."""
    prefill_seconds: float
    """To the first new token, the handover of the cache included."""
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None with fewer than two new tokens."""
        n = self.n_new_tokens - 1
        return n / self.decode_seconds if n > 0 and self.decode_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        confident = None if self.confidence is None else self.confidence >= UNFAMILIAR
        return {**asdict(self), "confident": confident, "tokens_per_second": self.tokens_per_second}


class ModelPool:
    """Models that are opened on first use; the least recently used ones are closed to keep under a limit."""

    def __init__(
        self, limit: int | None = None, context: int = 4096, n_threads: int | None = None, folder: str = "."
    ) -> None:
        """Hold at most ``limit`` bytes of files open at a time; None sets no limit."""
        self.limit, self.folder = limit, folder
        self._settings = context, n_threads
        self._open: OrderedDict[Path, LlamaServer] = OrderedDict()

    def get(self, path: Path, beside: Path | None = None) -> LlamaServer:
        """Return a model, opened if it is not.

        Args:
            path: of its file.
            beside: a file whose model must stay open.

        Raises:
            ConfigError: the limit is too small for what must be open together.
            ModelError: there is no such file, or llama.cpp cannot load it.
        """
        if path not in self._open:
            for each in (path, beside):
                if each is not None and not each.is_file():
                    raise ModelError(f"there is no file {each}, expected an exported model; run coreinfer-sim export.")
            needed = path.stat().st_size
            kept = beside.stat().st_size if beside is not None else 0
            if self.limit is not None and needed + kept > self.limit:
                raise ConfigError(
                    f"the memory limit is {readable_size(self.limit)}, but {readable_size(needed + kept)} must be open at a "
                    f"time ({path.name}{'' if beside is None else f' beside {beside.name}'}); raise it"
                    + ("." if beside is None else ", or take --prefill sparse.")
                )
            for other in list(self._open):
                if self.limit is None or self.n_bytes + needed <= self.limit:
                    break
                if other != beside:
                    del self._open[other]
                    gc.collect()
            self._open[path] = LlamaServer(path, self.folder, *self._settings)
        self._open.move_to_end(path)
        return self._open[path]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files that are open."""
        return sum(path.stat().st_size for path in self._open)

    def close(self) -> None:
        """Close all models."""
        self._open.clear()
        gc.collect()


class LlamaCppGenerator:
    """Generates on exported sets of an index."""

    def __init__(
        self,
        index: SemanticIndex,
        folder: str | Path,
        *,
        mode: str = "similarity",
        prefill: str = "dense",
        fallback: Fallback | str | None = None,
        memory_limit: int | None = None,
        context: int = 4096,
        n_threads: int | None = None,
    ) -> None:
        """Use the models that ``export --manifest --format gguf`` wrote.

        Args:
            index: routes the prompts.
            folder: with ``router.json`` and the models.
            mode: similarity, global or dense.
            prefill: "dense" reads prompts with the dense model, "sparse" with the one that decodes.
            fallback: for prompts that are unfamiliar to their cluster: global, dense or none; None takes global if it was
                exported.
            memory_limit: bytes of files that may be open at a time.
            context: positions of each model's cache.
            n_threads: of llama.cpp; None its own choice.

        Raises:
            ConfigError: settings that llama.cpp cannot follow, or an export of another index.
        """
        self.index, self._folder = index, Path(folder)
        self._router = _read_router(self._folder, index)
        self.mode, self._prefill = mode, prefill
        self.modes = [m for m, there in self._there().items() if there]
        """Modes that the exported sets allow."""
        if mode not in ("similarity", "global", "dense") or prefill not in ("dense", "sparse"):
            raise ConfigError(
                f"mode {mode} with {prefill} prefill was asked of llama.cpp, expected similarity, global or dense, and dense or "
                "sparse; sets that depend on the prompt need the backend transformers."
            )
        self._fallback = self._chosen_fallback(fallback)
        self._context = context
        self._files = tempfile.TemporaryDirectory(prefix="coreinfer-sim-")
        self.pool = ModelPool(memory_limit, context, n_threads, self._files.name)

    def __enter__(self) -> LlamaCppGenerator:
        """Use as a context; leaving it closes all models."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all models."""
        self.close()

    def close(self) -> None:
        """Close all models and forget saved caches."""
        self.pool.close()
        self._files.cleanup()

    def generate(
        self,
        prompt: str | list[Message],
        *,
        chat: bool = False,
        max_new_tokens: int = 128,
        shorten: bool = False,
        write: Callable[[str], None] | None = None,
        routed_by: str | None = None,
        mode: str | None = None,
        **sampling: Any,
    ) -> LlamaCppGeneration:
        """Continue a prompt.

        Args:
            prompt: text, or messages of a chat; routing looks at the last user's message.
            chat: put the prompt into the model's chat template.
            max_new_tokens: at most.
            shorten: where the context has no room for as many, generate fewer, rather than refuse.
            write: takes the text as it comes.
            routed_by: text that routes in place of the last user message.
            mode: for this call; None takes the generator's.
            **sampling: of llama.cpp's server, such as ``temperature``, ``top_k``, ``seed``, ``stop``; greedy without.

        Raises:
            PromptError: empty, or too long for the context.
            GenerationError: llama.cpp refused; the message says why.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        asked = routed_by or last_user_message(messages)
        begin = time.perf_counter()
        path, mode, match = self._route(asked, mode or self.mode)
        looked_up = time.perf_counter()
        dense = self._file(DENSE) if self._prefill == "dense" and mode != DENSE else None
        if dense is not None:
            self.pool.get(dense, beside=path)
        model = self.pool.get(path, beside=dense)
        loaded = time.perf_counter()
        text = model.post("/apply-template", {"messages": messages})["prompt"] if chat else str(prompt)
        ids = model.post("/tokenize", {"content": text, "add_special": True, "parse_special": chat})["tokens"]
        if shorten:
            max_new_tokens = within(self._context, len(ids), max_new_tokens)
        if len(ids) + max_new_tokens > self._context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, which with {max_new_tokens} new ones exceed the context of "
                f"{self._context}; shorten it, or raise --context."
            )
        request = {"temperature": 0.0, **sampling, "cache_prompt": True, "id_slot": 0, "return_tokens": True}
        new: list[int] = []
        shown = ""
        goes_on = True
        if dense is not None:
            reader = self.pool.get(dense, beside=path)
            answer = reader.complete({**request, "prompt": ids, "n_predict": 1}, None)
            new, shown = answer["tokens"], answer["content"]
            goes_on = answer["stop_type"] == "limit" and max_new_tokens > 1
            if goes_on:
                self._hand_over(reader, model)
        n_new, prefill_seconds = len(new), time.perf_counter() - loaded
        # A first token that ends within a character cannot be shown before what follows.
        stream = write if new == [] or shown.strip("\ufffd") else None
        if write is not None and stream is not None and shown:
            write(shown)
        if goes_on:
            answer = model.complete({**request, "prompt": [*ids, *new], "n_predict": max_new_tokens - n_new}, stream)
            n_new += answer["tokens_predicted"]
            new, shown = new + answer["tokens"], shown + answer["content"]
            if dense is None:
                prefill_seconds += answer["timings"]["prompt_ms"] / 1000
        decode_seconds = time.perf_counter() - loaded - prefill_seconds
        if stream is None:
            shown = model.post("/detokenize", {"tokens": new})["content"]
            if write is not None:
                write(shown)
        return LlamaCppGeneration(
            prompt=text,
            text=shown,
            n_new_tokens=n_new,
            ended=answer["stop_type"] != "limit",
            model=path.name,
            mode=mode,
            cluster=match.cluster if match else None,
            label=match.label if match else None,
            similarity=match.similarity if match else None,
            confidence=match.confidence if match else None,
            n_prompt_tokens=len(ids),
            prefill="sparse" if dense is None and mode != DENSE else "dense",
            lookup_seconds=looked_up - begin,
            load_seconds=loaded - looked_up,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )

    @staticmethod
    def _hand_over(dense: LlamaServer, model: LlamaServer) -> None:
        """Give the cache of the prompt that the dense model has read to the model that decodes."""
        saved = dense.post("/slots/0?action=save", {"filename": _SLOT})
        try:
            model.post("/slots/0?action=restore", {"filename": _SLOT})
        except GenerationError as error:
            raise GenerationError(
                f"the dense model's cache of {saved['n_saved']} positions does not fit {model.path.name}: {error} Export both "
                "anew from one model, or take --prefill sparse."
            ) from error

    def _route(self, asked: str, mode: str) -> tuple[Path, str, Match | None]:
        """Return the file that decodes, the mode that it stands for, and where the prompt lies."""
        if mode != "similarity":
            return self._file(mode), mode, None
        match = self.index.lookup(asked)[0]
        if not match.confident and self._fallback is not Fallback.NONE:
            return self._file(self._fallback.value), self._fallback.value, match
        return self._file(match.cluster), "similarity", match

    def _there(self) -> dict[str, bool]:
        clusters = [cluster["file"] for cluster in self._router["clusters"]]
        return {
            "similarity": any(clusters),
            GLOBAL: self._router["fallback"] is not None,
            DENSE: self._router["dense"] is not None,
        }

    def _file(self, which: int | str) -> Path:
        """Return the file of a cluster, GLOBAL or DENSE."""
        names = {GLOBAL: self._router["fallback"], DENSE: self._router["dense"]}
        name = names[which] if isinstance(which, str) else self._router["clusters"][which]["file"]
        if name is None:
            title = which if isinstance(which, str) else f"cluster {which}"
            raise ConfigError(
                f"{self._folder} lacks {title}, expected all sets that prompts may need; run coreinfer-sim export --cluster all "
                "--cluster global --cluster dense --format gguf --manifest."
            )
        return self._folder / name

    def _chosen_fallback(self, fallback: Fallback | str | None) -> Fallback:
        if fallback is None:
            return Fallback.GLOBAL if self._router["fallback"] is not None else Fallback.NONE
        if Fallback(fallback) is Fallback.HYBRID:
            raise ConfigError("the fallback is hybrid, whose sets depend on the prompt; take global, dense or none.")
        if Fallback(fallback) is not Fallback.NONE:
            self._file(Fallback(fallback).value)
        return Fallback(fallback)


def _read_router(folder: Path, index: SemanticIndex) -> dict[str, Any]:
    """Read ``router.json`` and check that it was exported from this index, as GGUF."""
    path = folder / ROUTER_FILE
    try:
        router: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes = [cluster["size"] for cluster in router["clusters"]]
        names = [
            name
            for name in (*(c["file"] for c in router["clusters"]), router["fallback"], router["dense"])
            if name is not None
        ]
        router["bytes"] = dict(router["bytes"])
    except OSError as error:
        raise ConfigError(
            f"{folder} has no {ROUTER_FILE}, expected an export; run coreinfer-sim export --cluster all --format gguf "
            "--manifest."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); export anew.") from error
    if sizes != [cluster.size for cluster in index.clusters]:
        raise ConfigError(f"{path} belongs to another index than {index.name}; export this one.")
    if any(Path(name).name != name or not name.endswith(".gguf") for name in names):
        raise ConfigError(f"{path} names {names[0]}, expected GGUF files beside it; export with --format gguf.")
    for name, n_bytes in router["bytes"].items():
        if name in names and (file := folder / name).is_file() and file.stat().st_size != n_bytes:
            raise ConfigError(f"{file} has {file.stat().st_size} bytes, export wrote {n_bytes}; export it anew.")
    return router
