"""GGUF metadata written from a published tokenizer.json, after the rules of llama.cpp's converter.

The converter's rules, restated: special tokens, and those that look it, are control tokens; other added ones are
user-defined, with spaces for SentencePiece's marks. Where a model's scores are not in the file, the order of merges
gives them, as it does in SentencePiece's own BPE models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARK = "\u2581"


def _looks_special(token: str) -> bool:
    """As llama.cpp's converter has it, for tokens that their config does not call special."""
    bars = (token.startswith("<|") and token.endswith("|>")) or (token.startswith("<｜") and token.endswith("｜>"))
    return bars or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or token.startswith("<unused")


def _tokens(content: dict[str, Any]) -> tuple[list[str], list[int]]:
    vocab: dict[str, int] = dict(content["model"]["vocab"])
    added = {token["content"]: token for token in content["added_tokens"]}
    vocab.update({name: token["id"] for name, token in added.items()})
    spelled = {id_: token for token, id_ in vocab.items()}
    tokens, kinds = [], []
    for id_ in range(max(spelled) + 1):
        token = spelled.get(id_)
        if token is None:
            tokens.append(f"[PAD{id_}]")
            kinds.append(5)
        elif token in added:
            control = added[token]["special"] or _looks_special(token)
            tokens.append(token if control else token.replace(MARK, " "))
            kinds.append(3 if control else 4)
        else:
            tokens.append(token)
            kinds.append(1)
    return tokens, kinds


def _ids(config: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name in ("bos", "eos", "unk"):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            entries["unknown_token_id" if name == "unk" else f"{name}_token_id"] = tokens.index(token)
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(config.get(key), bool):
            entries[key] = config[key]
    return entries


def written(folder: Path, pre: str | None, **changes: Any) -> dict[str, Any]:
    """The metadata of a model in `folder`. `pre`: the pre-tokenizer's name, or None for a SentencePiece model."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens, kinds = _tokens(content)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in content["model"]["merges"]]
    entries: dict[str, Any] = {"tokens": tokens, "token_type": kinds, **_ids(config, tokens)}
    if pre is not None:
        entries |= {"model": "gpt2", "pre": pre, "merges": [" ".join(merge) for merge in merges]}
    else:
        order: dict[str, int] = {}
        for left, right in merges:
            order.setdefault(left + right, len(order))
        scores = [-float(order.get(token, len(order))) for token in tokens]
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
        kinds[:] = [6 if token in bytes_ else kind for token, kind in zip(tokens, kinds, strict=True)]
        entries |= {"model": "llama", "pre": "default", "scores": scores}
    return {f"tokenizer.ggml.{key}": value for key, value in {**entries, **changes}.items() if value is not None}
