"""`tramontane inspect`: what a checkpoint is and what it would take to run it, without loading its weights.

Owns the report, of plain data. Must not know: how it is shown (`cli.card`); how a checkpoint is read or memory
estimated; the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli.options import AsJson, Model
from tramontane.errors import InvalidRequest, TramontaneError, UnsupportedModel

if TYPE_CHECKING:
    from tramontane.loading.checkpoint import Checkpoint
    from tramontane.loading.memory import Plan
    from tramontane.models.spec import ModelSpec
    from tramontane.text.tokenizer import Tokenizer

Report = dict[str, Any]
_GGUF_KIND = ("model", "pre")
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def inspect(
    model: Model = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence that memory is estimated for; the model's longest.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once that memory is estimated for.")] = 1,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template and nothing else.")] = False,
    save_tokenizer: Annotated[
        Path | None,
        typer.Option(help="Write a tokenizer.json to this folder, for programs that want one, and do nothing else."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's architecture, tensors, tokenizer, chat template and memory, without loading its weights."""
    from tramontane.cli.card import print_template, show
    from tramontane.cli.terminal import print_json

    if template and as_json:
        raise InvalidRequest("--template", "it prints the template alone", "The JSON report holds the template too.")
    if save_tokenizer is not None:
        _save_tokenizer(model, save_tokenizer)
        return
    report = examine(model, context=context, batch=batch)
    if template:
        print_template(report)
    elif as_json:
        print_json(report)
    else:
        show(report)


def examine(model: str | None, *, context: int | None = None, batch: int = 1) -> Report:
    """The report of `--json`. Raises what finding and opening the checkpoint raises; what only keeps this build from
    running it is told in `problems`."""
    from tramontane.cli.terminal import DownloadBar
    from tramontane.loading.checkpoint import open_checkpoint
    from tramontane.loading.licence import licence_of
    from tramontane.loading.sources import DEMO_MODEL, resolve

    source = model or DEMO_MODEL
    with DownloadBar() as progress:
        path = resolve(source, progress)
    with open_checkpoint(path) as checkpoint:
        problems: list[str] = []
        plan = _plan(checkpoint, problems)
        spec = plan.spec if plan else None
        parameters = _parameters(checkpoint, spec)
        tokenizer = _tokenizer(checkpoint, problems)
        return {
            "model": source,
            "path": str(path),
            "name": _first_text(checkpoint.metadata.get("general.name"), checkpoint.config.get("_name_or_path")),
            "licence": licence_of(checkpoint),
            "format": checkpoint.kind,
            "container": checkpoint.container,
            "architecture": _architecture(checkpoint, spec),
            "context_length": spec.context_length if spec else _stated_context(checkpoint),
            "parameters": parameters,
            "tensors": _tensors(checkpoint),
            "quantization": _quantization(checkpoint, parameters),
            "tokenizer": tokenizer and _described(checkpoint, tokenizer),
            **_templates(checkpoint, tokenizer, problems),
            "generates": spec.generates if spec else None,
            "embedding": _embedding(checkpoint, spec, problems),
            "memory": _memory(plan, context, batch),
            "loads": not problems,
            "through_transformers": plan is None and not problems,
            "kernels": None if problems else _kernels(),
            "problems": problems,
        }


def _kernels() -> str:
    """The name of those that would compute, on the device that is taken where none is named."""
    from tramontane.kernels import cpu, for_device
    from tramontane.kernels.device import resolve_device

    device = resolve_device()
    return for_device(device, kernels="reference" if device == "cpu" and not cpu.available() else "auto").name


def _first_text(*values: Any) -> str | None:
    return next((value for value in values if isinstance(value, str) and value), None)


def _plan(checkpoint: Checkpoint, problems: list[str]) -> Plan | None:
    """What the checkpoint will become; None where this build has no decoder for it, which is a problem unless it can
    be tried through transformers."""
    from tramontane.loading.build import checked_plan
    from tramontane.loading.fallback import can_be_tried, refusal_of

    try:
        if refusal_of(checkpoint) is not None and can_be_tried(checkpoint):
            return None
        return checked_plan(checkpoint)
    except UnsupportedModel as error:
        problems.append(str(error))
        return None


def _parameters(checkpoint: Checkpoint, spec: ModelSpec | None) -> int | None:
    """How many numbers the model is made of; None where they are packed in a way that this build does not know."""
    entries = checkpoint.tensors.values()
    if spec is None and any(entry.format in _PACKED and len(entry.shape) > 1 for entry in entries):
        return None
    return sum(math.prod(entry.shape) for entry in entries)


def _stated_context(checkpoint: Checkpoint) -> int | None:
    """The context length of a model that this build cannot run."""
    stated = checkpoint.metadata.get(f"{checkpoint.metadata.get('general.architecture')}.context_length")
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        stated = config.get("max_position_embeddings", config.get("max_seq_len", stated))
    return stated if type(stated) is int else None


def _quantization(checkpoint: Checkpoint, parameters: int | None) -> Report:
    nbytes = sum(entry.nbytes for entry in checkpoint.tensors.values())
    return {
        "method": checkpoint.quantization or None,
        "bits_per_weight": round(8 * nbytes / parameters, 2) if parameters else None,
    }


def _architecture(checkpoint: Checkpoint, spec: ModelSpec | None) -> Report:
    stored = checkpoint.metadata.get("general.architecture") or checkpoint.config.get("model_type")
    if spec is None:
        return {"name": _first_text(stored)}
    return spec.summary()


def _tensors(checkpoint: Checkpoint) -> Report:
    by_type: dict[str, dict[str, int]] = {}
    for entry in checkpoint.tensors.values():
        row = by_type.setdefault(entry.format, {"count": 0, "elements": 0, "bytes": 0})
        row["count"] += 1
        row["elements"] += math.prod(entry.shape)
        row["bytes"] += entry.nbytes
    return {
        "count": len(checkpoint.tensors),
        "bytes": sum(row["bytes"] for row in by_type.values()),
        "by_type": dict(sorted(by_type.items(), key=lambda item: -item[1]["bytes"])),
    }


def _tokenizer(checkpoint: Checkpoint, problems: list[str]) -> Tokenizer | None:
    from tramontane.backends.language import tokenizer_of

    if problems and checkpoint.folder is None and not any(key.startswith("tokenizer.") for key in checkpoint.metadata):
        return None  # no language model at all, as was said
    try:
        return tokenizer_of(checkpoint)
    except TramontaneError as error:
        problems.append(str(error))
        return None


def _save_tokenizer(model: str | None, folder: Path) -> None:
    from tramontane.backends.language import tokenizer_of
    from tramontane.cli.terminal import DownloadBar
    from tramontane.loading.checkpoint import open_checkpoint
    from tramontane.loading.sources import DEMO_MODEL, resolve

    with DownloadBar() as progress:
        path = resolve(model or DEMO_MODEL, progress)
    with open_checkpoint(path) as checkpoint:
        tokenizer_of(checkpoint).save(folder)


def _described(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Report:
    from tramontane.backends.language import named_tokens
    from tramontane.text.tokenizer import tokenizer_file

    def shown(id_: int) -> Report:
        return {"id": id_, "text": tokenizer.token_text(id_)}

    file = tokenizer_file(checkpoint.folder) if checkpoint.folder else None
    kind = [tokenizer.kind, file.name] if file else [checkpoint.metadata.get(f"tokenizer.ggml.{k}") for k in _GGUF_KIND]
    return {
        "kind": ", ".join(part for part in kind if isinstance(part, str)),
        "vocab_size": tokenizer.vocab_size,
        "bos": None if tokenizer.bos_id is None else shown(tokenizer.bos_id),
        "eos": [shown(id_) for id_ in sorted(tokenizer.eos_ids)],
        "named": named_tokens(checkpoint, tokenizer),
        "special": [shown(id_) for id_ in sorted(tokenizer.special_ids)],
    }


def _templates(checkpoint: Checkpoint, tokenizer: Tokenizer | None, problems: list[str]) -> Report:
    """The source of the template that a chat uses, the names of all that there are, and whether tools reach a model."""
    from tramontane.backends.language import template_of, templates_of

    named: dict[str, str] = {}
    template = None
    try:
        named = templates_of(checkpoint)
        template = template_of(checkpoint, tokenizer)
    except TramontaneError as error:
        problems.append(str(error))
    return {
        "chat_template": template.source if template else None,
        "chat_templates": sorted(named),
        "takes_tools": template is not None and template.takes_tools,
    }


def _embedding(checkpoint: Checkpoint, spec: ModelSpec | None, problems: list[str]) -> Report | None:
    """How texts are embedded; None for what does not load, and for a model that writes and says nothing of it."""
    from tramontane.loading.heads import embedding_settings, scoring_head

    if spec is None:
        return None
    try:
        settings, scoring = embedding_settings(checkpoint, spec), scoring_head(checkpoint, spec)
    except TramontaneError as error:
        if not spec.generates:
            problems.append(str(error))
        return None
    if spec.generates and not settings.stated:
        return None
    return {
        "pooling": list(settings.head.pooling),
        "normalize": settings.head.normalize,
        "dimensions": settings.head.width(spec.hidden_size),
        "max_length": min(settings.max_length or spec.context_length, spec.context_length),
        "prompts": dict(settings.prompts),
        "labels": scoring.labels if scoring else 0,
    }


def _memory(plan: Plan | None, context: int | None, batch: int) -> Report | None:
    from tramontane.loading.memory import estimate
    from tramontane.platform import available_memory

    if plan is None:
        return None
    spec = plan.spec
    if context is not None and context > spec.context_length:
        raise InvalidRequest("--context", f"{context} exceeds the model's {spec.context_length}", "Give less.")
    needed = estimate(plan, context_length=context or spec.context_length, batch=batch)
    return {
        "context": context or spec.context_length,
        "batch": batch,
        "weights_bytes": needed.weights,
        "cache_bytes": needed.cache,
        "workspace_bytes": needed.workspace,
        "total_bytes": needed.total,
        "available_bytes": available_memory(),
    }
