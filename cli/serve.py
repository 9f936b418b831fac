"""`coreinfer-sim serve`."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from coreinfer_sim.base.errors import ConfigError

from . import llamacpp, options
from .console import note_plain_sets, quiet_libraries, status

_D = {"show_default": True}
_TRANSFORMERS_ONLY = ("keep_ratio", "model", "dtype", "device", "engine", "weights", "cluster_cache")


@click.command()
@click.option("--index", required=True, type=click.Path(), help="Index folder.")
@click.option("--model", metavar="NAME", help="Hub id, checkpoint folder or GGUF file.  [default: the index's model]")
@click.option("--name", help="What clients call the model.  [default: the last part of its name]")
@click.option(
    "--mode",
    type=click.Choice(["similarity", "hybrid", "stability", "global", "random", "dense"]),
    default="similarity",
    **_D,
    help="Where the kept neurons come from, unless a request says otherwise.",
)
@click.option("--keep-ratio", type=float, help="Share that decode keeps.  [default: the index's]")
@click.option(
    "--fallback",
    type=click.Choice(["hybrid", "dense", "global", "none"]),
    help="For prompts that are unfamiliar to their cluster; see generate.",
)
@click.option("--host", default="127.0.0.1", **_D, help="Address to listen on; other than loopback asks for a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, **_D)
@click.option("--api-key", envvar="COREINFER_API_KEY", show_envvar=True, help="That clients must send.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=1024, **_D, help="Of one answer.")
@click.option("--queue-limit", type=click.IntRange(1), default=64, **_D, help="Requests that may wait at a time.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=300.0, **_D, help="Seconds of a request.")
@click.option(
    "--body-limit", callback=options.size, default="2MiB", **_D, metavar="SIZE", help="Of one request's content."
)
@click.option(
    "--backend",
    type=click.Choice(["transformers", "llamacpp"]),
    default="transformers",
    **_D,
    help="What runs the model.",
)
@llamacpp.only_options
@click.option(
    "--prefill",
    type=click.Choice(["dense", "sparse"]),
    default="dense",
    **_D,
    help="For llamacpp: who reads the prompt, the dense model or the one that decodes.",
)
@options.engine
@options.encoder
@options.model_options
@click.pass_context
def serve(ctx: click.Context, index: str, host: str, port: int, api_key: str | None, **given: Any) -> None:
    """Serve the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models; also /health, /metrics, and a page at /.

    \b
    coreinfer-sim serve --index my-index --model ./my-model
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "How do stars form?"}], "max_tokens": 64}'
    """
    try:
        import uvicorn

        from coreinfer_sim.serving.app import make_app
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'coreinfer-sim[serve]'") from error
    if not api_key and not _is_loopback(host):
        raise ConfigError(f"{host} can be reached from other machines, expected an API key then; give --api-key.")
    quiet_libraries()
    with status("Loading the model"):
        backend, title = _llama_cpp(ctx, index) if given["backend"] == "llamacpp" else _transformers(ctx, index)
    app = make_app(
        backend,
        given["name"] or title,
        api_key=api_key,
        max_new_tokens=given["max_new_tokens"],
        queue_limit=given["queue_limit"],
        timeout=given["timeout"],
        body_limit=given["body_limit"],
    )

    class Server(uvicorn.Server):
        """Tells answers that are under way to come to their end before uvicorn cuts them off."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.stop()
            super().handle_exit(sig, frame)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    with _listening(host, port) as listener:
        place = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        click.echo(f"Serving {given['name'] or title} at http://{place} – Ctrl-C ends it.", err=True)
        server.run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Open the port before anything is served, so that a busy one is one sentence."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be opened ({error.strerror or error}), expected a free port of this machine; name another "
            "with --host and --port."
        ) from error


def _transformers(ctx: click.Context, index: str) -> tuple[Any, str]:
    from coreinfer_sim.choosing.compatibility import check_model
    from coreinfer_sim.index.encoder import SentenceEncoder
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.models.loading import load_model, tokenizer_hash
    from coreinfer_sim.serving.backends import TransformersBackend

    given = ctx.params
    llamacpp.refuse_only_options(ctx)
    if ctx.get_parameter_source("prefill") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--prefill needs --backend llamacpp.")
    loaded = SemanticIndex.load(index, SentenceEncoder(given["encoder"]) if given["encoder"] else None)
    name = given["model"] or loaded.manifest.model.name
    language_model = load_model(name, given["dtype"], given["device"], lean=given["engine"] != "compiled")
    check_model(loaded, language_model.layers, tokenizer_hash(language_model.tokenizer))
    note_plain_sets(loaded, given["keep_ratio"])
    runtime = {"engine": given["engine"], "weights": given["weights"], "cache_bytes": given["cluster_cache"]}
    backend = TransformersBackend(
        language_model, loaded, given["mode"], runtime, keep_ratio=given["keep_ratio"], fallback=given["fallback"]
    )
    return backend, Path(name).name


def _llama_cpp(ctx: click.Context, index: str) -> tuple[Any, str]:
    from coreinfer_sim.engines.llamacpp.generator import LlamaCppGenerator
    from coreinfer_sim.index.encoder import SentenceEncoder
    from coreinfer_sim.index.index import SemanticIndex
    from coreinfer_sim.serving.backends import LlamaCppBackend

    given = ctx.params
    for name in _TRANSFORMERS_ONLY:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} does not apply to --backend llamacpp, whose models were fixed by export."
            )
    if given["exported"] is None:
        raise ConfigError("llama.cpp needs the models exported from the index; give --exported.")
    loaded = SemanticIndex.load(index, SentenceEncoder(given["encoder"]) if given["encoder"] else None)
    generator = LlamaCppGenerator(
        loaded,
        given["exported"],
        **{name: given[name] for name in ("mode", "prefill", "fallback", "memory_limit", "context")},
    )
    return LlamaCppBackend(generator), Path(loaded.manifest.model.name).name


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
