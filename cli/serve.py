"""`coreinfer-sim serve`."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress
from pathlib import Path
from types import FrameType

import click

from coreinfer_sim.base.decode_settings import DecodeConfig, ModelConfig, SelectionConfig
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.extra import require
from coreinfer_sim.base.settings import Profile

from . import options
from .console import ConsoleProgress, note_plain_sets, quiet_libraries
from .profiles import chosen_profile, profile_option
from .settings import Settings, set_option

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+")


@click.command()
@options.index_that_is_needed
@options.model
@click.option("--name", help="What clients call the model.  [default: the last part of its name]")
@profile_option
@options.mode
@options.keep_ratio
@options.read_ratio
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; other than loopback asks for a key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--api-key", envvar="COREINFER_API_KEY", show_envvar=True, help="That clients must send.")
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Pages of this origin, such as https://example.org, may ask in a browser; * for all; may be given several times.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Of one answer; a request for more gets so many.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Requests that are answered at a time; each holds keys and values of its own.",
)
@click.option(
    "--queue-limit", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait at a time."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds of a request."
)
@click.option(
    "--body-limit",
    callback=options.size,
    default="2MiB",
    show_default=True,
    metavar="SIZE",
    help="Of one request's content.",
)
@click.option(
    "--log-topics", is_flag=True, help="Count prompts by topic, without their texts; 'info' shows which are asked."
)
@options.engine
@options.weights
@set_option("select", "decode", "model")
def serve(
    index: str | None,
    model: str | None,
    name: str | None,
    profile: Profile | None,
    mode: str | None,
    keep_ratio: float | None,
    read_ratio: float | None,
    host: str,
    port: int,
    api_key: str | None,
    cors_origins: tuple[str, ...],
    max_new_tokens: int,
    parallel: int,
    queue_limit: int,
    timeout: float,
    body_limit: int,
    log_topics: bool,
    engine: str | None,
    weights: str | None,
    settings: Settings,
) -> None:
    """Serve the OpenAI API, and a page.

    It answers /v1/chat/completions, /v1/completions and /v1/models. /health and /metrics tell how it goes. The page is at /.

    \b
    coreinfer-sim serve --index my-index --model ./my-model
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "How do stars form?"}], "max_tokens": 64}'
    """
    require("the server", "serve", "fastapi", "prometheus_client", "uvicorn")
    import uvicorn

    from coreinfer_sim.serving.app import make_app

    if not api_key and not _is_loopback(host):
        raise ConfigError(f"{host} can be reached from other machines, expected an API key then; give --api-key.")
    for origin in cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-origin is {origin!r}, expected what a browser sends: scheme://host or scheme://host:port without a "
                "path and in small letters, null, or * for all."
            )
    from coreinfer_sim.generation.opening import load
    from coreinfer_sim.serving.backends import Backend

    quiet_libraries()
    selection = settings.make(SelectionConfig, mode=mode, keep_ratio=keep_ratio, read_ratio=read_ratio)
    decode = settings.make(DecodeConfig, engine=engine, weights=weights)
    if decode.memory_budget is not None:
        raise ConfigError("a memory budget is planned for one text, but a server generates many; leave it out.")
    progress, index = ConsoleProgress(), options.needed_index(index)
    with progress.waiting("Loading the model"):
        generator = load(
            index,
            model,
            profile=chosen_profile(profile, index, selection, decode),
            selection=selection,
            decode=decode,
            loading=settings.make(ModelConfig),
            progress=progress,
        )
    if generator.index is not None and selection.compensated:
        note_plain_sets(generator.index, selection.keep_ratio)
    title = name or Path(generator.name).name
    if not generator.has_chat_template:
        click.echo(
            f"Note: {title} has no chat template, so it continues texts: /v1/completions alone answers.", err=True
        )
    app = make_app(
        Backend(generator),
        title,
        api_key=api_key,
        max_new_tokens=max_new_tokens,
        parallel=parallel,
        queue_limit=queue_limit,
        timeout=timeout,
        body_limit=body_limit,
        cors_origins=cors_origins,
        log_topics=log_topics,
    )

    class Server(uvicorn.Server):
        """Tells answers that are under way to come to their end before uvicorn cuts them off."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.stop()
            super().handle_exit(sig, frame)

    # No logging of uvicorn's own: setting it up closes the handlers, and so the streams, of others in this process.
    server = Server(uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=10))
    with _listening(host, port) as listener:
        place = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        click.echo(f"Serving {title} at http://{place} – Ctrl-C ends it.", err=True)
        with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
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


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
