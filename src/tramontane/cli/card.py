"""What `tramontane inspect` found, for people.

Owns the wording. Must not know: where the facts come from; what they say may come out of a file, and is made harmless.
"""

from __future__ import annotations

import os
from typing import Any

from tramontane.errors import UnsupportedModel

Report = dict[str, Any]
_SHOWN = 8
"""Special tokens named."""


def print_template(report: Report) -> None:
    """The chat template and nothing else. Raises UnsupportedModel without one."""
    from tramontane.cli.terminal import harmless

    if report["chat_template"] is None:
        raise UnsupportedModel(f"{report['path']} has no chat template that can be used.", "It completes text.")
    print(harmless(report["chat_template"]))


def show(report: Report) -> None:
    """All of it, a line a fact."""
    tensors = report["tensors"]
    _row("model", report["name"] or "unnamed")
    _row("source", report["model"])
    _row("file", _homely(report["path"]))
    _row("format", report["container"])
    _row("licence", report["licence"] or "not stated")
    _show_architecture(report["architecture"])
    if report["context_length"]:
        _row("context", f"{report['context_length']} tokens")
    known = report["parameters"]
    _row("parameters", f"{known:,}" if known else "not known: they are packed in a way that this build does not read")
    _show_quantization(report["quantization"])
    _row("tensors", f"{tensors['count']}, {_size(tensors['bytes'])}")
    for name, row in tensors["by_type"].items():
        _row(f"  {name}", f"{row['count']:>5} tensors {row['elements']:>15,} weights {_size(row['bytes']):>12}")
    _show_tokenizer(report["tokenizer"])
    if report["embedding"]:
        _show_embedding(report["embedding"])
    if report["generates"] is False:
        _row("writes", "nothing: it reads texts")
    else:
        _show_template(report)
    if report["memory"]:
        _show_memory(report["memory"])
    way = (
        "through transformers, if a check while loading finds it right"
        if report["through_transformers"]
        else "natively"
    )
    _row("loads", f"yes, {way}, on {report['kernels']} kernels" if report["loads"] else "no")
    for problem in report["problems"]:
        _row("", problem)


def _show_embedding(embedding: Report) -> None:
    kept = "normalized" if embedding["normalize"] else "not normalized"
    _row("embeds", f"{' and '.join(embedding['pooling'])}, {kept}, {embedding['dimensions']} wide")
    _row("  texts", f"of up to {embedding['max_length']} tokens")
    if embedding["prompts"]:
        _row("  prompts", ", ".join(embedding["prompts"]))
    if embedding["labels"]:
        _row(
            "  classifies", "how well texts fit a query" if embedding["labels"] == 1 else f"{embedding['labels']} ways"
        )


def _show_template(report: Report) -> None:
    from tramontane.cli.terminal import one_line

    template = report["chat_template"]
    shown = f"{len(template)} characters: {one_line(template, 60)}" if template else "none: it completes text"
    _row("chat template", shown)
    if template:
        others = [name for name in report["chat_templates"] if name != "default"]
        _row("  tools", "shown to the model" if report["takes_tools"] else "left out by the template")
        if others:
            _row("  others", ", ".join(others))


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
    kept = [f"{joined('kv_heads')} of keys and values"] if arch["kv_heads"] else []
    wide = f"{joined('head_dim')} wide"
    shared = [f"over a vector of {joined('latent_size')} a token"] if arch["latent_size"] else []
    heads = ", ".join([f"{joined('heads')} heads", *kept, wide, *shared])
    _row("  attention", heads + (f", windows of {joined('windows')}" if arch["windows"] else ""))
    _row("  feed-forward", f"{joined('intermediate_size')} wide, {joined('activation')}")
    if arch["rope_theta"]:
        _row("  positions", f"rope, theta {joined('rope_theta')}, scaling {joined('rope_scaling')}")
    else:
        _row("  positions", "learned" if arch["positions"] else "not rotated")
    head = "the embedding is also the head" if arch["tied_embeddings"] else "a head of its own"
    head = head if arch["head"] else "no head"
    _row("  vocabulary", f"{arch['vocab_size']} rows, {head}")


def _show_quantization(quantization: Report) -> None:
    bits = quantization["bits_per_weight"]
    parts = (quantization["method"], None if bits is None else f"{bits:g} bits a weight")
    _row("quantization", ", ".join(part for part in parts if part) or "not known")


def _show_tokenizer(tokenizer: Report | None) -> None:
    if tokenizer is None:
        _row("tokenizer", "none that can be used")
        return
    _row("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens")
    bos = tokenizer["bos"]
    _row("  begins", f"{bos['text']} ({bos['id']})" if bos else "with no token of its own")
    _row("  ends", ", ".join(f"{token['text']} ({token['id']})" for token in tokenizer["eos"]) or "never by itself")
    special = [token["text"] for token in tokenizer["special"]]
    more = f" and {len(special) - _SHOWN} more" if len(special) > _SHOWN else ""
    _row("  special", (", ".join(special[:_SHOWN]) + more) or "none")


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
