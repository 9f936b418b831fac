"""The `coreinfer-sim` command: its group, and what every command does about errors."""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Any

import click

from coreinfer_sim.base.errors import (
    DISK_FULL,
    CoreInferSimError,
    MissingModelError,
    UnknownEngineError,
    as_out_of_memory,
)

from .about import print_version
from .analyze import analyze
from .bench import bench
from .build_index import build_index
from .cache import cache
from .config import config, default_map, name_variables
from .demo import demo
from .evaluate import evaluate
from .export import export
from .generate import generate
from .hub import pull, push
from .inspect import check, info, lookup, show, verify
from .library import list_, rm
from .living import diff, extend, merge, recluster
from .report import report
from .run import run
from .serve import serve
from .settings import SetOption
from .status import status
from .tune import tune

INTERRUPTED = 130
_FORCE = re.compile(r"(?<=replace it with )force\b")
_COLUMNS = re.compile(r"(?<![\w.-])prompt_column\b( or template\b)?")
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; read when tqdm is first imported


class _Group(click.Group):
    """Runs `run` where no command is named, and turns the errors that a user can meet into one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and self._means_run(ctx, args):
            args = [str(run.name), *args]
        return super().parse_args(ctx, args)

    def _means_run(self, ctx: click.Context, args: list[str]) -> bool:
        """Tell whether arguments begin with a prompt or an option of `run`; one word is the name of a command."""
        if not args:
            return True
        own = {text for param in self.get_params(ctx) for text in param.opts}
        return args[0] not in own if args[0].startswith("-") else len(args[0].split()) > 1

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 3, 0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            ctx.fail(
                f"There is no command {args[0]!r}{hint}. A prompt of one word is asked by: coreinfer-sim run {args[0]}"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            params = [] if error.ctx is None else error.ctx.command.params
            settings = [each for each in params if isinstance(each, SetOption)]
            setting = settings[0].named(error.option_name) if settings else None
            if setting is None:
                raise
            raise click.UsageError(
                f"there is no option {error.option_name}; it is a setting: --set {setting}=VALUE.", error.ctx
            ) from error
        except UnknownEngineError as error:
            _fail(ctx, str(error), 2)
        except MissingModelError as error:
            _fail(ctx, f"{error} (--model NAME)", 1)
        except CoreInferSimError as error:
            _fail(ctx, self._as_given(ctx, str(error)), 1)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in ("build-index", "analyze", "export", "extend")
            _fail(
                ctx,
                "interrupted" + ("; run the same command again to go on from what was finished." if goes_on else "."),
                INTERRUPTED,
            )
        except BrokenPipeError:  # the reader of our output has gone; keep Python from complaining at exit
            sys.stdout = None
            ctx.exit(1)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            remedy = "free some space" if error.errno in DISK_FULL else "check the path and its permissions"
            _fail(ctx, f"{error.strerror or error}{where}; {remedy} and run the same command again.", 1)
        except (MemoryError, RuntimeError) as error:
            if (found := as_out_of_memory(error)) is None:
                raise
            _fail(ctx, f"{found}; use a smaller batch (--set build.batch_size=…) or model.", 1)

    def _as_given(self, ctx: click.Context, message: str) -> str:
        """Name the columns of a corpus, and `force`, in a message of the library as the command takes them."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        has_options = command is not None and any(each.name == "prompt_column" for each in command.params)
        column, template = (
            ("--prompt-column", "--template") if has_options else ("corpus.prompt_column", "corpus.template")
        )
        message = _FORCE.sub("--force", message)
        return _COLUMNS.sub(lambda found: column + (f" or {template}" if found[1] else ""), message)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    ctx.exit(code)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option("--version", "wants_version", is_flag=True, help="Show the version and exit.")
@click.option("-v", "--verbose", is_flag=True, help="With --version: also torch, the processor's features and folders.")
@click.pass_context
def main(ctx: click.Context, wants_version: bool, verbose: bool) -> None:
    """Decode large language models from the core neurons of the prompt's semantic cluster.

    \b
    coreinfer-sim build-index prompts.jsonl --model MODEL
    coreinfer-sim "How do stars form?"
    coreinfer-sim
    """
    if wants_version:
        print_version(verbose)
        ctx.exit()
    if verbose:
        raise click.UsageError("-v is of --version; give both.")
    if ctx.invoked_subcommand != config.name:  # which mends the file
        ctx.default_map = default_map(main)


_WORK = (run, build_index, status, generate, evaluate, tune, bench, analyze, export, serve)
_INDEXES = (list_, show, report, check, diff, extend, merge, recluster, rm, push, pull, info, lookup, verify)
for _command in (demo, *_WORK, *_INDEXES, config, cache):
    main.add_command(_command)
name_variables(main)
