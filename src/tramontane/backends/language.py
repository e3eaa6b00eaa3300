"""What a checkpoint says of text: its tokenizer, and its chat template told of the tokenizer's named tokens.

Owns where in a checkpoint each is looked for. Must not know: engines, requests, tensors.
"""

from __future__ import annotations

from typing import Any

from tramontane.errors import ModelNotFound
from tramontane.loading.checkpoint import Checkpoint
from tramontane.text.template import ChatTemplate, named_templates, select_template
from tramontane.text.tokenizer import Tokenizer, tokenizer_file

TOOL_USE = "tool_use"
"""The named template for requests with tools, where a model has one of its own."""

_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""As templates and tokenizer_config.json call them -> as GGUF does."""


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata, or in the best of the files beside other checkpoints.

    Raises ModelNotFound without one, CorruptCheckpoint or UnsupportedModel.
    """
    if checkpoint.folder is None:
        return Tokenizer.from_gguf(checkpoint.metadata, str(checkpoint.path))
    file = tokenizer_file(checkpoint.folder)
    if file is None:
        raise ModelNotFound(
            str(checkpoint.path),
            "it has no tokenizer.json, nor another tokenizer's file",
            "Put the model's tokenizer.json there.",
        )
    return Tokenizer.from_file(file, checkpoint.tokenizer_config)


def templates_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's chat templates by name; the main one is "default". Raises CorruptCheckpoint."""
    return named_templates(**_places(checkpoint))


def _places(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "jinja_file": checkpoint.chat_template,
        "additional": checkpoint.additional_templates,
        "config": checkpoint.tokenizer_config,
        "gguf": checkpoint.metadata if checkpoint.folder is None else None,
    }


def template_of(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, override: str | None = None
) -> ChatTemplate | None:
    """The chat template to use, or None where there is none; `override` is a source that replaces the model's.

    Without a tokenizer the template is not told what only that knows.
    Raises CorruptCheckpoint or TemplateError.
    """
    source = select_template(override=override, **_places(checkpoint))
    if source is None:
        return None
    tool_use = templates_of(checkpoint).get(TOOL_USE) if override is None else None
    tokens = named_tokens(checkpoint, tokenizer)
    bos, eos = tokens.pop("bos_token", None), tokens.pop("eos_token", None)
    return ChatTemplate(source, bos_token=bos, eos_token=eos, special_tokens=tokens, tool_use=tool_use)


def named_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, str]:
    """The texts of the tokens that have a part to play: `bos_token`, `eos_token`, `unk_token`, `pad_token`."""
    named: dict[str, str] = {}
    for name, key in _NAMED_TOKENS.items():
        entry = checkpoint.tokenizer_config.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        id_ = checkpoint.metadata.get(f"tokenizer.ggml.{key}") if checkpoint.folder is None else None
        if isinstance(text, str):
            named[name] = text
        elif isinstance(id_, int) and tokenizer is not None:
            named[name] = tokenizer.token_text(id_)
    if tokenizer is not None and checkpoint.folder is not None and not checkpoint.tokenizer_config:
        # tekken.json and tokenizer.model say it themselves
        ends = {"bos_token": tokenizer.bos_id, "eos_token": min(tokenizer.eos_ids, default=None)}
        named |= {name: tokenizer.token_text(id_) for name, id_ in ends.items() if id_ is not None}
    return named
