"""`tramontane serve`: a model behind OpenAI's interface.

Owns the command's options. Must not know: how requests are answered.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli import garbage
from tramontane.cli.options import Backend, Device, Model, Profile, Settings, Threads, engine_options, read_text
from tramontane.cli.terminal import DownloadBar, ProgressLines, coloured
from tramontane.errors import InvalidRequest, MissingExtra

if TYPE_CHECKING:
    from tramontane.backends.base import Backend as Opened
    from tramontane.server.keys import ApiKey
    from tramontane.server.settings import LogFormat

log = logging.getLogger("tramontane.server")

KEYS_VARIABLE = "TRAMONTANE_API_KEYS"


def serve(
    model: Model = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; its own name if not given. May be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(help=f"A file with lines of NAME KEY [PRIORITY]; or {KEYS_VARIABLE} holds such lines."),
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Listen beyond this machine without any key.")
    ] = False,
    share_prefixes: Annotated[
        bool, typer.Option("--share-prefixes", help="Let requests of different keys share cached prefixes.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may call the server. May be repeated.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Where a proxy mounts the server, such as /llm.")] = "",
    tls_certificate: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="And its key (PEM).")] = None,
    max_requests: Annotated[int, typer.Option(help="Requests open at once; more are refused with 429.")] = 512,
    max_requests_per_key: Annotated[int | None, typer.Option(help="The same for one key.")] = None,
    max_body: Annotated[int, typer.Option(help="Largest body of a request, in bytes.")] = 4 << 20,
    max_n: Annotated[int, typer.Option(help="Most choices of one request.")] = 16,
    max_inputs: Annotated[int, typer.Option(help="Most prompts, texts or documents of one request.")] = 2048,
    max_connections: Annotated[
        int | None, typer.Option(help="Connections open at once; if not given: by ulimit -n.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 600.0,
    idle_timeout: Annotated[float, typer.Option(help="Seconds that a client may leave a connection idle.")] = 20.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for running requests to end on SIGTERM.")] = 30.0,
    log_format: Annotated[
        str, typer.Option(help="json, text, or auto: text on a terminal.", show_default=True)
    ] = "auto",
    log_file: Annotated[Path | None, typer.Option(help="Write the log there instead of to standard error.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked to the log, too.")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file to use as the chat template.")] = None,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
    profile: Profile = None,
) -> None:
    """Serve a model over HTTP, by the interface that OpenAI's clients speak. The socket opens at once; /ready says when
    the model is loaded."""
    try:
        from tramontane.server.serving import serve as run
        from tramontane.server.settings import Limits, ServerSettings
    except ModuleNotFoundError as error:
        raise MissingExtra("server", "Serving") from error
    from tramontane import __version__

    limits = Limits(
        body_bytes=max_body,
        n=max_n,
        open_requests=max_requests,
        open_requests_per_key=max_requests_per_key,
        inputs=max_inputs,
        request_seconds=timeout,
        idle_seconds=idle_timeout,
        drain_seconds=drain_timeout,
        connections=max_connections,
    )
    own_name, given = _own_name(model, backend), engine_options(device, threads, option, profile)
    settings = ServerSettings(
        names=tuple(name) if name else (own_name,),
        host=host,
        port=port,
        keys=_keys(api_keys),
        allow_anyone=allow_anyone,
        share_prefixes=share_prefixes,
        cors_origins=tuple(cors_origin or ()),
        root_path=root_path,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        limits=limits,
        log_format=_log_format(log_format, log_file),
        log_file=log_file,
        log_prompts=log_prompts,
    )
    template = read_text(chat_template, "--chat-template") if chat_template else None
    with DownloadBar() as bar:  # which is on the screen no longer than the model loads; but a signal may end that
        code = run(settings, lambda: _open(model, backend, template, given, bar), __version__)
    if code:
        raise typer.Exit(code)


def _open(
    model: str | None, backend: str | None, template: str | None, given: dict[str, Any], bar: DownloadBar
) -> Opened:
    """The backend. How far it has come shows on a terminal as `bar`, else the log says it."""
    from tramontane.backends.registry import all_declared, open_backend
    from tramontane.types import SamplingParams

    all_declared()  # which a refusal names: it is not to import them while others wait
    progress = bar if coloured(sys.stderr) else ProgressLines(log.info)
    with bar:
        opened = open_backend(
            model, given, SamplingParams(), backend=backend, chat_template=template, progress=progress
        )
    garbage.look_again()
    return opened


def _own_name(model: str | None, backend: str | None) -> str:
    """What clients call a model that is given no name: as it was named, but of a path its last part. Raises
    InvalidRequest where no backend can be chosen."""
    from tramontane.backends.registry import choose

    chosen, source = choose(model, backend)
    name = str(source) or chosen.name
    return Path(name).resolve().name.removesuffix(".gguf") if Path(name).exists() else name


def _keys(path: Path | None) -> tuple[ApiKey, ...]:
    from tramontane.server.keys import read_keys

    if path is not None:
        return read_keys(read_text(path, "--api-keys"), str(path))
    held = os.environ.get(KEYS_VARIABLE)
    return read_keys(held, KEYS_VARIABLE) if held else ()


def _log_format(given: str, log_file: Path | None) -> LogFormat:
    if given == "auto":
        return "text" if log_file is None and sys.stderr.isatty() else "json"
    if given not in ("json", "text"):
        raise InvalidRequest("--log-format", f"{given!r} is unknown", "Use auto, json or text.")
    return "json" if given == "json" else "text"
