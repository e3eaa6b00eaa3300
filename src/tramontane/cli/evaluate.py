"""`tramontane eval`: how good a model's predictions are.

Owns the command's options and output. Must not know: how scores are computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tramontane.cli.options import AsJson, Backend, Device, Model, Settings, Threads, open_llm, read_text

app = typer.Typer(name="eval", help="Evaluate a model.", no_args_is_help=True, add_completion=False)


@app.callback()
def _root() -> None:
    """Evaluate a model."""


@app.command()
def perplexity(
    file: Annotated[Path, typer.Argument(help="A text file.")],
    model: Model = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Score only the first so many windows.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens a window; not given: min(1024, context).")] = None,
    as_json: AsJson = False,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
) -> None:
    """Perplexity over non-overlapping windows of a text, BOS first, each window's first token unscored."""
    from tramontane.cli.terminal import print_json
    from tramontane.evaluate.perplexity import perplexity as measure

    text = read_text(file, "FILE")
    with open_llm(model, device, threads, option, backend=backend) as llm:
        result = measure(llm, text, context=context, windows=windows)
        name = llm.capabilities().model
    if as_json:
        print_json({"model": name, "file": str(file), **result.as_dict()})
    else:
        print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} windows")
