"""The byte-level BPE tokenizer that a GGUF file's metadata describes, rebuilt for the tokenizers package.

Owns the `tokenizer.ggml.*` keys and their checks, and the pre-tokenizers named by `tokenizer.ggml.pre`. Must not
know: files, templates, tensors. Sources: ggml's GGUF specification; the published tokenizer.json of the models
each pre-tokenizer is named after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tramontane.errors import CorruptCheckpoint, UnsupportedModel

_MAX_TOKENS = 1 << 21  # the largest known vocabularies have 2**18
_MAX_MERGES = 1 << 22
_MAX_TOKEN_CHARS = 4096
_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4  # ggml's token types that matter here; the rest are plain pieces
_TOKEN_TYPES = frozenset(range(1, 7))


@dataclass(frozen=True)
class _Pre:
    """What comes before the merges. `split`: a regular expression, or None for GPT-2's own."""

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say


def _modern_split(digits: str) -> str:
    """The pattern that cl100k began and Llama 3 and Qwen 2 share but for the length of digit groups."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_LLAMA3 = _Pre(split=_modern_split(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_PRE: Mapping[str, _Pre] = {
    "default": _Pre(),
    "gpt-2": _Pre(),
    "smollm": _Pre(digits=True),
    "qwen2": _Pre(split=_modern_split(r"\p{N}"), nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
}


@dataclass(frozen=True)
class GGUFVocab:
    """A rebuilt tokenizer and what the metadata says around it."""

    inner: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    eot_ids: frozenset[int]
    add_bos: bool
    add_eos: bool


def _is_unicode(text: str) -> bool:
    """Whether a text can leave Python: one with lone surrogates cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Metadata:
    """Typed, checked access to the `tokenizer.ggml.` keys."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self.source = source

    def corrupt(self, detail: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self.source, detail)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.corrupt(f"tokenizer.ggml.{key} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def items(self, key: str, kind: type, limit: int) -> list[Any] | None:
        """A list (or array) of `kind`, or None where the key is missing."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not hasattr(value, "__len__") or isinstance(value, (str, bytes, Mapping)):
            raise self.corrupt(f"tokenizer.ggml.{key} is a {type(value).__name__}, not a list")
        if len(value) > limit:
            raise self.corrupt(f"tokenizer.ggml.{key} has {len(value)} entries; more than {limit} cannot be meant")
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        wrong = [item for item in items if type(item) is not kind]
        if wrong:
            raise self.corrupt(f"tokenizer.ggml.{key} holds {wrong[0]!r:.40}, which is not of type {kind.__name__}")
        if kind is str and not _is_unicode("".join(items)):
            raise self.corrupt(f"tokenizer.ggml.{key} holds text that is not Unicode")
        return items

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise self.corrupt(f"tokenizer.ggml.{key} is {value!r:.40}, not a token id")
        if not 0 <= int(value) < vocab_size:
            raise self.corrupt(f"tokenizer.ggml.{key} is {int(value)}, outside a vocabulary of {vocab_size}")
        return int(value)


def build(metadata: Mapping[str, Any], source: str) -> GGUFVocab:
    """Rebuild the tokenizer. Raises UnsupportedModel for a kind this build lacks, CorruptCheckpoint for nonsense."""
    meta = _Metadata(metadata, source)
    pre = _pre(meta)
    tokens = meta.items("tokens", str, _MAX_TOKENS)
    merges = meta.items("merges", str, _MAX_MERGES)
    if not tokens or merges is None:
        raise meta.corrupt(f"tokenizer.ggml.{'merges' if tokens else 'tokens'} is missing")
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        again = next(token for id_, token in enumerate(tokens) if vocab[token] != id_)
        raise meta.corrupt(f"tokenizer.ggml.tokens lists {again!r:.60} more than once")
    if max(map(len, tokens)) > _MAX_TOKEN_CHARS or "" in vocab:
        raise meta.corrupt(f"tokenizer.ggml.tokens holds an empty token or one of more than {_MAX_TOKEN_CHARS} letters")
    model = models.BPE(vocab=vocab, merges=_pairs(meta, merges, vocab), ignore_merges=pre.ignore_merges)
    inner = tokenizers.Tokenizer(model)
    _add_pre_tokenizer(inner, pre)
    inner.decoder = decoders.ByteLevel()
    _add_special_tokens(inner, meta, tokens)
    size = len(tokens)
    ends = (meta.token_id(key, size) for key in ("eot_token_id", "eom_token_id"))
    return GGUFVocab(
        inner=inner,
        bos_id=meta.token_id("bos_token_id", size),
        eos_id=meta.token_id("eos_token_id", size),
        eot_ids=frozenset(id_ for id_ in ends if id_ is not None),
        add_bos=meta.get("add_bos_token", bool, pre.add_bos),
        add_eos=meta.get("add_eos_token", bool, False),
    )


def _pre(meta: _Metadata) -> _Pre:
    remedy = "Use a safetensors checkpoint of the model, with its tokenizer.json."
    kind = meta.get("model", str)
    if kind is None:
        raise meta.corrupt("tokenizer.ggml.model is missing")
    if kind != "gpt2":
        raise UnsupportedModel(f"{meta.source}: GGUF tokenizer model {kind!r:.40} is not supported.", remedy)
    name = meta.get("pre", str, "default")
    if name not in _PRE:
        known = ", ".join(_PRE)
        message = f"{meta.source}: GGUF pre-tokenizer {name!r:.40} is not supported (known: {known})."
        raise UnsupportedModel(message, remedy)
    if meta.get("add_space_prefix", bool, False):
        raise UnsupportedModel(f"{meta.source}: add_space_prefix with a byte-level tokenizer is not supported.", remedy)
    return _PRE[name]


def _pairs(meta: _Metadata, merges: list[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges as pairs. Checked here: the tokenizers package panics on some that name unknown tokens."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise meta.corrupt(f"the merge {merge!r:.60} does not join two tokens of the vocabulary into a third")
        pairs.append((left, right))
    return pairs


def _add_pre_tokenizer(inner: tokenizers.Tokenizer, pre: _Pre) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None)
    steps: list[pre_tokenizers.PreTokenizer] = [byte_level]
    if pre.split is not None:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pre.split), behavior="isolated"))
    if pre.digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.nfc:
        inner.normalizer = normalizers.NFC()


def _add_special_tokens(inner: tokenizers.Tokenizer, meta: _Metadata, tokens: list[str]) -> None:
    types = meta.items("token_type", int, _MAX_TOKENS)
    if types is None:
        return
    if len(types) != len(tokens) or not _TOKEN_TYPES.issuperset(types):
        raise meta.corrupt(f"tokenizer.ggml.token_type does not give each of {len(tokens)} tokens a type from 1 to 6")
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    inner.add_tokens(added)
