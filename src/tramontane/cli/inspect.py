"""`tramontane inspect`: what a checkpoint is and what it would take to run it, without loading its weights.

Owns the report and its wording. Must not know: the engine; how a checkpoint is read or memory estimated.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli.options import AsJson, Model
from tramontane.errors import InvalidRequest, TramontaneError, UnsupportedModel

if TYPE_CHECKING:
    from tramontane.loading.checkpoint import Checkpoint
    from tramontane.models.spec import ModelSpec

Report = dict[str, Any]


def inspect(
    model: Model = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence that memory is estimated for; the model's longest.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once that memory is estimated for.")] = 1,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's architecture, tensors, tokenizer, chat template and memory, without loading its weights."""
    from tramontane.cli.terminal import print_json

    if template and as_json:
        raise InvalidRequest("--template", "it prints the template alone", "The JSON report holds the template too.")
    report = examine(model, context=context, batch=batch)
    if template:
        _print_template(report)
    elif as_json:
        print_json(report)
    else:
        _show(report)


def examine(model: str | None, *, context: int | None = None, batch: int = 1) -> Report:
    """The report of `--json`. Raises what finding and opening the checkpoint raises; what only keeps this build from
    running it is told in `problems`."""
    from tramontane.cli.terminal import DownloadBar
    from tramontane.loading.checkpoint import open_checkpoint
    from tramontane.loading.sources import DEMO_MODEL, resolve

    source = model or DEMO_MODEL
    with DownloadBar() as progress:
        path = resolve(source, progress)
    with open_checkpoint(path) as checkpoint:
        problems: list[str] = []
        spec = _spec(checkpoint, problems)
        return {
            "model": source,
            "path": str(path),
            "name": _first_text(checkpoint.metadata.get("general.name"), checkpoint.config.get("_name_or_path")),
            "licence": _first_text(checkpoint.metadata.get("general.license"), checkpoint.metadata.get("license")),
            "format": checkpoint.kind,
            "architecture": _architecture(checkpoint, spec),
            "parameters": sum(_elements(entry.shape) for entry in checkpoint.tensors.values()),
            "tensors": _tensors(checkpoint),
            "tokenizer": _tokenizer(checkpoint, problems),
            "chat_template": _template(checkpoint, problems),
            "memory": _memory(checkpoint, spec, context, batch),
            "loads": not problems,
            "problems": problems,
        }


def _first_text(*values: Any) -> str | None:
    return next((value for value in values if isinstance(value, str) and value), None)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _spec(checkpoint: Checkpoint, problems: list[str]) -> ModelSpec | None:
    from tramontane.loading.build import checked_spec

    try:
        return checked_spec(checkpoint)
    except UnsupportedModel as error:
        problems.append(str(error))
        return None


def _architecture(checkpoint: Checkpoint, spec: ModelSpec | None) -> Report:
    stored = checkpoint.metadata.get("general.architecture") or checkpoint.config.get("model_type")
    if spec is None:
        return {"name": _first_text(stored)}
    layers = spec.layers
    ropes = sorted({layer.rope.scaling.kind if layer.rope.scaling else "none" for layer in layers})
    return {
        "name": spec.family,
        "layers": len(layers),
        "hidden_size": spec.hidden_size,
        "heads": sorted({layer.num_heads for layer in layers}),
        "kv_heads": sorted({layer.num_kv_heads for layer in layers}),
        "head_dim": sorted({layer.head_dim for layer in layers}),
        "intermediate_size": sorted({layer.intermediate_size for layer in layers}),
        "activation": sorted({layer.activation for layer in layers}),
        "rope_theta": sorted({layer.rope.theta for layer in layers}),
        "rope_scaling": ropes,
        "windows": sorted({layer.window for layer in layers if layer.window is not None}),
        "vocab_size": spec.vocab_size,
        "context_length": spec.context_length,
        "tied_embeddings": spec.tied_embeddings,
    }


def _tensors(checkpoint: Checkpoint) -> Report:
    by_type: dict[str, dict[str, int]] = {}
    for entry in checkpoint.tensors.values():
        row = by_type.setdefault(entry.format, {"count": 0, "elements": 0, "bytes": 0})
        row["count"] += 1
        row["elements"] += _elements(entry.shape)
        row["bytes"] += entry.nbytes
    return {
        "count": len(checkpoint.tensors),
        "bytes": sum(row["bytes"] for row in by_type.values()),
        "by_type": dict(sorted(by_type.items(), key=lambda item: -item[1]["bytes"])),
    }


def _tokenizer(checkpoint: Checkpoint, problems: list[str]) -> Report | None:
    from tramontane.loading.checkpoint import read_json
    from tramontane.text.tokenizer import Tokenizer

    kind: list[Any]
    try:
        if checkpoint.kind == "gguf":
            kind = [checkpoint.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
            tokenizer = Tokenizer.from_gguf(checkpoint.metadata, str(checkpoint.path))
        elif checkpoint.tokenizer_json is None:
            problems.append("It has no tokenizer.json. Put the model's tokenizer.json there.")
            return None
        else:
            model = read_json(checkpoint.tokenizer_json).get("model")
            kind = [model.get("type") if isinstance(model, dict) else None]
            tokenizer = Tokenizer.from_file(checkpoint.tokenizer_json, checkpoint.tokenizer_config)
    except TramontaneError as error:
        problems.append(str(error))
        return None
    bos = tokenizer.bos_id
    return {
        "kind": ", ".join(part for part in kind if isinstance(part, str)),
        "vocab_size": tokenizer.vocab_size,
        "bos": None if bos is None else {"id": bos, "text": tokenizer.token_text(bos)},
        "eos": [{"id": id_, "text": tokenizer.token_text(id_)} for id_ in sorted(tokenizer.eos_ids)],
    }


def _template(checkpoint: Checkpoint, problems: list[str]) -> str | None:
    from tramontane.text.template import ChatTemplate, select_template

    try:
        source = select_template(
            jinja_file=checkpoint.chat_template,
            config=checkpoint.tokenizer_config,
            gguf=checkpoint.metadata if checkpoint.kind == "gguf" else None,
        )
        if source is not None:
            ChatTemplate(source)
    except TramontaneError as error:
        problems.append(str(error))
        return None
    return source


def _memory(checkpoint: Checkpoint, spec: ModelSpec | None, context: int | None, batch: int) -> Report | None:
    from tramontane.loading.memory import estimate
    from tramontane.platform import available_memory

    if spec is None:
        return None
    if context is not None and context > spec.context_length:
        raise InvalidRequest("--context", f"{context} exceeds the model's {spec.context_length}", "Give less.")
    needed = estimate(checkpoint, spec, context_length=context or spec.context_length, batch=batch)
    return {
        "context": context or spec.context_length,
        "batch": batch,
        "weights_bytes": needed.weights,
        "cache_bytes": needed.cache,
        "workspace_bytes": needed.workspace,
        "total_bytes": needed.total,
        "available_bytes": available_memory(),
    }


# ---- for people -----------------------------------------------------------------------------------------------


def _print_template(report: Report) -> None:
    from tramontane.cli.terminal import harmless

    if report["chat_template"] is None:
        raise UnsupportedModel(f"{report['path']} has no chat template that can be used.", "It completes text.")
    print(harmless(report["chat_template"]))


def _show(report: Report) -> None:
    from tramontane.cli.terminal import one_line

    tensors = report["tensors"]
    _row("model", report["name"] or "unnamed")
    _row("source", report["model"])
    _row("file", _homely(report["path"]))
    _row("format", "GGUF" if report["format"] == "gguf" else report["format"])
    _row("licence", report["licence"] or "not stated")
    _show_architecture(report["architecture"])
    _row("parameters", f"{report['parameters']:,}")
    _row("tensors", f"{tensors['count']}, {_size(tensors['bytes'])}")
    for name, row in tensors["by_type"].items():
        _row(f"  {name}", f"{row['count']:>5} tensors {row['elements']:>15,} weights {_size(row['bytes']):>12}")
    _show_tokenizer(report["tokenizer"])
    template = report["chat_template"]
    shown = f"{len(template)} characters: {one_line(template, 60)}" if template else "none: it completes text"
    _row("chat template", shown)
    if report["memory"]:
        _show_memory(report["memory"])
    _row("loads", "yes" if report["loads"] else "no")
    for problem in report["problems"]:
        _row("", problem)


def _row(name: str, value: str) -> None:
    """One line. What it says may come out of a file, so it is made harmless."""
    from tramontane.cli.terminal import harmless

    print(harmless(f"{name:<16}{value}").replace("\n", " ").replace("\t", " ").rstrip())


def _homely(path: str) -> str:
    """The path with ~ for the home folder, as people write it."""
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path


def _show_architecture(arch: Report) -> None:
    if "layers" not in arch:
        _row("architecture", arch["name"] or "not stated")
        return

    def joined(name: str) -> str:
        return "/".join(f"{value:g}" if isinstance(value, float) else str(value) for value in arch[name])

    _row("architecture", f"{arch['name']}, {arch['layers']} layers of {arch['hidden_size']}")
    heads = f"{joined('heads')} heads, {joined('kv_heads')} of keys and values, {joined('head_dim')} wide"
    _row("  attention", heads + (f", windows of {joined('windows')}" if arch["windows"] else ""))
    _row("  feed-forward", f"{joined('intermediate_size')} wide, {joined('activation')}")
    _row("  positions", f"rope, theta {joined('rope_theta')}, scaling {joined('rope_scaling')}")
    head = "the embedding is also the head" if arch["tied_embeddings"] else "a head of its own"
    _row("  vocabulary", f"{arch['vocab_size']} rows, {head}")
    _row("context", f"{arch['context_length']} tokens")


def _show_tokenizer(tokenizer: Report | None) -> None:
    if tokenizer is None:
        _row("tokenizer", "none that can be used")
        return
    _row("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens")
    bos = tokenizer["bos"]
    _row("  begins", f"{bos['text']} ({bos['id']})" if bos else "with no token of its own")
    _row("  ends", ", ".join(f"{token['text']} ({token['id']})" for token in tokenizer["eos"]) or "never by itself")


def _show_memory(memory: Report) -> None:
    sequences = "1 sequence" if memory["batch"] == 1 else f"{memory['batch']} sequences"
    _row("memory", f"for {sequences} of {memory['context']} tokens")
    for name in ("weights", "cache", "workspace", "total"):
        _row(f"  {name}", f"{_size(memory[f'{name}_bytes']):>12}")
    fits = "it fits" if memory["total_bytes"] <= memory["available_bytes"] else "it does not fit"
    _row("  free now", f"{_size(memory['available_bytes']):>12}: {fits}")


def _size(nbytes: int) -> str:
    from tramontane.loading.memory import shown

    return shown(nbytes)
