"""The `coreinfer-sim` command: its group, and what every command does about errors."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from coreinfer_sim.base.errors import CoreInferSimError, MissingModelError, UnknownEngineError, as_out_of_memory

from .bench import bench
from .build_index import build_index
from .cache import cache
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import info, lookup, verify
from .serve import serve
from .tune import tune

INTERRUPTED = 130
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; read when tqdm is first imported


class _Group(click.Group):
    """Turns the errors that a user can meet into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UnknownEngineError as error:
            _fail(ctx, str(error), 2)
        except MissingModelError as error:
            _fail(ctx, f"{error} (--model NAME)", 1)
        except CoreInferSimError as error:
            _fail(ctx, str(error), 1)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in ("build-index", "export")
            _fail(
                ctx,
                "interrupted"
                + ("; what was finished is kept – run the same command again to go on." if goes_on else "."),
                INTERRUPTED,
            )
        except BrokenPipeError:  # the reader of our output has gone; keep Python from complaining at exit
            sys.stdout = None
            ctx.exit(1)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            remedy = (
                "free some space"
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                else "check the path and its permissions"
            )
            _fail(ctx, f"{error.strerror or error}{where}; {remedy} and run the same command again.", 1)
        except (MemoryError, RuntimeError) as error:
            if (found := as_out_of_memory(error)) is None:
                raise
            _fail(ctx, f"{found}; use a smaller batch (--set build.batch_size=…) or model.", 1)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    ctx.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="coreinfer-sim", prog_name="coreinfer-sim")
def main() -> None:
    """Decode large language models from the core neurons of the prompt's semantic cluster.

    \b
    coreinfer-sim build-index prompts.jsonl --model MODEL --out my-index
    coreinfer-sim lookup my-index "How do stars form?"
    coreinfer-sim generate --index my-index --model MODEL "How do stars form?"
    """


for _command in (build_index, info, verify, lookup, generate, evaluate, tune, bench, export, serve, cache):
    main.add_command(_command)
