"""`tramontane eval`: how good a model's predictions are.

Owns the command's options and output. Must not know: how scores are computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tramontane.cli.options import Device, Model, Settings, Threads, open_llm

app = typer.Typer(help="Evaluate a model.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Evaluate a model."""


@app.command()
def perplexity(
    file: Annotated[Path, typer.Argument(help="A text file.", exists=True, dir_okay=False, readable=True)],
    model: Model = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Score only the first so many windows.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens a window; min(1024, context) when not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the JSON object.")] = False,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
) -> None:
    """Perplexity over non-overlapping windows of a text, BOS first, each window's first token unscored."""
    from tramontane.evaluate.perplexity import perplexity as measure

    text = file.read_text(encoding="utf-8")
    with open_llm(model, device, threads, option) as llm:
        result = measure(llm, text, context=context, windows=windows)
    fields = {"model": llm.capabilities().model, "file": str(file), **result.as_dict()}
    if not as_json:
        print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} windows")
    print(json.dumps(fields))
