"""The `tramontane` command: its subcommands, and how errors reach a terminal.

Owns the command tree and exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Importing it must stay cheap:
a command's module is imported when it is asked for, and what the command needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tramontane import __version__
from tramontane.cli import garbage
from tramontane.errors import InvalidRequest, TramontaneError

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("run", "run"),
    "serve": ("serve", "serve"),
    "inspect": ("inspect", "inspect"),
    "bench": ("bench", "bench"),
    "pull": ("models", "pull"),
    "list": ("models", "list_models"),
    "rm": ("models", "remove"),
    "doctor": ("doctor", "doctor"),
    "eval": ("evaluate", "app"),
}
"""Each command's module here, and what it is there: a function, or a Typer of several."""


class _Commands(TyperGroup):
    """Makes a command when it is asked for, and runs it so that every failure is one line on standard error, and an
    exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": dict.fromkeys(_COMMANDS)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.commands and self.commands[cmd_name] is None:
            self.commands[cmd_name] = _made(cmd_name)
        return self.commands.get(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        _log_plainly()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # so that a full disk is found out while it can be told
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None  # the reader has gone: there is nobody to tell
        except (TramontaneError, OSError, MemoryError) as error:
            _fail(_described(error), error)
            raise typer.Exit(2 if isinstance(error, InvalidRequest) else 1) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("click", "typer"):
                raise  # usage errors and exits are theirs to show
            known = f"unexpected {type(error).__name__}: {error}. This is a bug in Tramontane; "
            _fail(known + "set TRAMONTANE_DEBUG=1 to see where.", error)
            raise typer.Exit(1) from None
        return result


app = typer.Typer(
    name="tramontane",
    help="Run open language models fast on the machine at hand.",
    cls=_Commands,
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


def _made(name: str) -> Any:
    module, attribute = _COMMANDS[name]
    found = getattr(import_module(f"tramontane.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        command, found = found, typer.Typer(add_completion=False)
        found.command(name)(command)
    return typer.main.get_command(found)


def main() -> None:
    """The console script. No traceback reaches a user unless TRAMONTANE_DEBUG is set."""
    garbage.put_off()
    # Numpy, not loaded yet, starts a thread of BLAS a processor, and they wait busily; our kernels have their own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A stream that was closed before we came is None in Python.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows the rest
    try:
        app(prog_name="tramontane")
    finally:
        _flush()


def _flush() -> None:
    """Write out what is left, and keep the interpreter from complaining again at its end if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _log_plainly() -> None:
    import logging

    from tramontane.cli.terminal import Complaints

    logger = logging.getLogger("tramontane")
    if not any(isinstance(handler, Complaints) for handler in logger.handlers):
        logger.addHandler(Complaints(logging.WARNING))
        logger.propagate = False


def _described(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}. Use a smaller context, batch or model."
    if isinstance(error, OSError) and not isinstance(error, TramontaneError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return str(error)


def _fail(message: str, error: BaseException) -> None:
    if os.environ.get("TRAMONTANE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    from tramontane.cli.terminal import complain

    complain("error", message)
