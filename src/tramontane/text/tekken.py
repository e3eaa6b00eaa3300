"""`tekken.json`: Mistral's byte-pair tokenizer, a list of byte strings by rank and a pattern.

Owns that file. Must not know: chat templates, control tokens' meaning. Source: the files that mistral-common
publishes; the tiktoken rule that they are made for: of all neighbours whose bytes together are a token, those of the
lowest rank join first.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.text.pieces import BYTE_ALPHABET
from tramontane.text.vocab import MAX_TOKENS, Vocab, derive_merges, number, soundness

_LETTERS = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
_MAX_BYTES = 512  # of a token; the longest known has 128
_MAX_PATTERN = 4096

# The control tokens of files that do not list their own (versions up to 7), in the order of their ids.
# fmt: off
_FIRST_CONTROLS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)
# fmt: on


def build(data: bytes, source: str) -> Vocab:
    """Read a `tekken.json`. Texts begin with BOS. Raises CorruptCheckpoint or UnsupportedModel."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(source, f"not JSON: {error}") from error
    file = _Reader(content, source)
    config = file.get(content, "config", dict)
    pattern = file.get(config, "pattern", str)
    if len(pattern) > _MAX_PATTERN:
        raise CorruptCheckpoint(source, f"a pattern of {len(pattern)} letters cannot be meant")
    size, num_controls = (file.get(config, key, int) for key in ("default_vocab_size", "default_num_special_tokens"))
    if not 0 < num_controls < size <= MAX_TOKENS:
        raise CorruptCheckpoint(source, f"a vocabulary of {size} tokens, {num_controls} of them special")
    controls = _controls(file, content, config, num_controls)
    ranked = _ranked(file, content, size - num_controls)
    tokens = [*controls, *("".join(map(_LETTERS.__getitem__, token)) for token in ranked)]
    ids = number(tokens, source, "the vocabulary")
    with soundness(source, "tekken.json"):
        merges = derive_merges(tokens[num_controls:], {t: ids[t] for t in tokens[num_controls:]}, source)
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=True)
        inner = tokenizers.Tokenizer(model)
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        inner.decoder = decoders.ByteLevel()
        inner.add_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in controls])
    bos, eos = ids.get("<s>"), ids.get("</s>")
    if bos is None or eos is None:
        raise CorruptCheckpoint(source, "the special tokens lack <s> or </s>")
    return Vocab(inner, bos, frozenset({eos}), (bos,))


class _Reader:
    """Typed access to the parts of the file."""

    def __init__(self, content: object, source: str) -> None:
        self.source = source
        if not isinstance(content, dict):
            raise CorruptCheckpoint(source, f"a {type(content).__name__}, not an object")

    def get(self, entry: Mapping[str, Any], key: str, kind: type) -> Any:
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind:
            raise CorruptCheckpoint(self.source, f"{key} is {value!r:.40}, not a {kind.__name__}")
        return value


def _controls(file: _Reader, content: Mapping[str, Any], config: Mapping[str, Any], size: int) -> list[str]:
    """Names of the first `size` ids; those without one are called as mistral-common calls them."""
    names = [f"<SPECIAL_{id_}>" for id_ in range(size)]
    if content.get("special_tokens") is None:
        version = str(config.get("version"))
        if version not in ("v1", "v2", "v3", "v7"):
            raise UnsupportedModel(
                f"{file.source}: version {version!r:.20} names no special tokens.", "Use the model's tokenizer.json."
            )
        listed: dict[int, str] = dict(enumerate(_FIRST_CONTROLS))
    else:
        entries = file.get(content, "special_tokens", list)
        listed = {file.get(entry, "rank", int): file.get(entry, "token_str", str) for entry in entries}
    for id_, name in listed.items():
        if not 0 <= id_ < size:
            raise CorruptCheckpoint(file.source, f"special token {name!r:.40} has the id {id_} of {size}")
        names[id_] = name
    return names


def _ranked(file: _Reader, content: Mapping[str, Any], size: int) -> list[bytes]:
    """The tokens' bytes in order of rank, as many as the vocabulary takes: files list more."""
    entries: Sequence[Any] = file.get(content, "vocab", list)
    if len(entries) < size:
        raise CorruptCheckpoint(file.source, f"{len(entries)} tokens are listed, {size} are in use")
    tokens = []
    for rank, entry in enumerate(entries[:size]):
        if file.get(entry, "rank", int) != rank:
            raise CorruptCheckpoint(file.source, f"the token at place {rank} has the rank {entry['rank']}")
        try:
            token = base64.b64decode(file.get(entry, "token_bytes", str), validate=True)
        except (binascii.Error, ValueError) as error:
            raise CorruptCheckpoint(file.source, f"the token of rank {rank} is not base64") from error
        if len(token) > _MAX_BYTES or (rank < 256 and token != bytes([rank])):
            raise CorruptCheckpoint(file.source, f"the token of rank {rank} is {token!r:.40}")
        tokens.append(token)
    return tokens
