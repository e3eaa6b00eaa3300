"""The `tramontane` command: its subcommands, and how errors reach a terminal.

Owns the command tree and exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Importing it must stay cheap:
commands import what they need when they run.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tramontane import __version__
from tramontane.cli import bench, doctor, evaluate, inspect, run
from tramontane.errors import InvalidRequest, TramontaneError

app = typer.Typer(
    name="tramontane",
    help="Run open language models fast on the machine at hand.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tramontane {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.add_typer(evaluate.app, name="eval")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The console script. No traceback reaches a user unless TRAMONTANE_DEBUG is set."""
    try:
        app()
    except TramontaneError as error:
        _fail(str(error), error)
        sys.exit(2 if isinstance(error, InvalidRequest) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader has gone: say nothing, and keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", error)
        sys.exit(1)
    except Exception as error:
        _fail(
            f"unexpected {type(error).__name__}: {error}. This is a bug in Tramontane; "
            "set TRAMONTANE_DEBUG=1 to see where.",
            error,
        )
        sys.exit(1)


def _fail(message: str, error: Exception) -> None:
    if os.environ.get("TRAMONTANE_DEBUG"):
        raise error
    from tramontane.cli.terminal import RED, style

    print(f"{style('error:', RED, sys.stderr)} {message}", file=sys.stderr)
