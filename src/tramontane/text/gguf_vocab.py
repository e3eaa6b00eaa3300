"""The tokenizer that a GGUF file's metadata describes, rebuilt for the tokenizers package.

Owns the `tokenizer.ggml.*` keys, their checks and their defaults. Must not know: files, templates, tensors.
Sources: ggml's GGUF specification; llama.cpp for what a missing key means and which tokens end a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.text import scored, wordpiece
from tramontane.text.pretokenizers import PRE_TOKENIZERS, Pre
from tramontane.text.scored import MARK, Kind, Scored
from tramontane.text.vocab import MAX_TOKENS, Vocab, number, soundness

_MAX_MERGES = 1 << 22
_MAX_CHARSMAP = 16 << 20
_REMEDY = "Use a safetensors checkpoint of the model, with its tokenizer.json."

# Tokens that end a turn by their name, where a file's keys say nothing of them.
# fmt: off
_TURN_ENDS = frozenset(
    (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<turn|>", "<｜end▁of▁sentence｜>", "[e~[",
    )
)
# fmt: on

# Special tokens of Phi-3 take the spaces after them along, as its tokenizer.json says and GGUF cannot; but for these.
_PHI3_KEEP = frozenset(("<unk>", "<s>", "<|endoftext|>"))


class Metadata:
    """Typed, checked access to the `tokenizer.ggml.` keys."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self.source = source

    def corrupt(self, detail: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self.source, detail)

    def named(self, *names: str) -> bool:
        """Whether the model's own name contains one of `names`."""
        name = self._metadata.get("general.name")
        return isinstance(name, str) and any(part in name.lower() for part in names)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.corrupt(f"tokenizer.ggml.{key} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def items(self, key: str, kinds: type | tuple[type, ...], limit: int) -> list[Any] | None:
        """A list (or array) of one of `kinds`, or None where the key is missing."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not hasattr(value, "__len__") or isinstance(value, (str, bytes, Mapping)):
            raise self.corrupt(f"tokenizer.ggml.{key} is a {type(value).__name__}, not a list")
        if len(value) > limit:
            raise self.corrupt(f"tokenizer.ggml.{key} has {len(value)} entries; more than {limit} cannot be meant")
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        wrong = [item for item in items if type(item) not in allowed]
        if wrong:
            raise self.corrupt(f"tokenizer.ggml.{key} holds {wrong[0]!r:.40}, which is not a {allowed[0].__name__}")
        return items

    def tokens(self) -> list[str]:
        """The tokens; one without a text is called by its id, as llama.cpp does."""
        tokens = self.items("tokens", str, MAX_TOKENS)
        if not tokens:
            raise self.corrupt("tokenizer.ggml.tokens is missing")
        return [token or f"[EMPTY_{id_}]" for id_, token in enumerate(tokens)]

    def kinds(self, size: int) -> list[int]:
        """Each token's kind; all are normal where the file does not say."""
        kinds = self.items("token_type", int, MAX_TOKENS)
        if kinds is None:
            return [int(Kind.NORMAL)] * size
        if len(kinds) != size or not frozenset(range(7)).issuperset(kinds):
            raise self.corrupt(f"tokenizer.ggml.token_type does not give each of {size} tokens a type from 0 to 6")
        return kinds

    def token_id(self, key: str, vocab_size: int, default: int | None = None) -> int | None:
        """A key that names a token. A default beyond the vocabulary is none."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default if default is not None and default < vocab_size else None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise self.corrupt(f"tokenizer.ggml.{key} is {value!r:.40}, not a token id")
        if not 0 <= int(value) < vocab_size:
            raise self.corrupt(f"tokenizer.ggml.{key} is {int(value)}, outside a vocabulary of {vocab_size}")
        return int(value)


def build(metadata: Mapping[str, Any], source: str) -> Vocab:
    """Rebuild the tokenizer. Raises UnsupportedModel for a kind this build lacks, CorruptCheckpoint for nonsense."""
    meta = Metadata(metadata, source)
    kind = meta.get("model", str)
    if kind is None:
        raise meta.corrupt("tokenizer.ggml.model is missing")
    if kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise UnsupportedModel(
            f"{source}: GGUF tokenizer model {kind!r:.40} is not supported (known: {known}).", _REMEDY
        )
    return _BUILDERS[kind](meta)


def _ends(
    meta: Metadata,
    inner: tokenizers.Tokenizer,
    tokens: Sequence[str],
    kinds: Sequence[int],
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    bos: int | None = None,
    eos: int | None = None,
) -> Vocab:
    """The vocabulary with what the keys, or these defaults, say about its ends."""
    size = len(tokens)
    bos_id, eos_id = meta.token_id("bos_token_id", size, bos), meta.token_id("eos_token_id", size, eos)
    prefix, suffix = meta.get("add_bos_token", bool, add_bos), meta.get("add_eos_token", bool, add_eos)
    for wanted, id_, name in ((prefix, bos_id, "bos"), (suffix, eos_id, "eos")):
        if wanted and id_ is None:
            raise meta.corrupt(f"add_{name}_token is set but {name}_token_id is missing")
    ends = {eos_id, *(meta.token_id(key, size) for key in ("eot_token_id", "eom_token_id"))}
    by_name = {
        id_
        for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if token in _TURN_ENDS and kind == Kind.CONTROL
    }
    if {"<|end|>", "<|call|>"} <= {tokens[id_] for id_ in by_name}:  # harmony: <|end|> ends a message, not the turn
        by_name.discard(tokens.index("<|end|>"))
    return Vocab(
        inner,
        bos_id,
        frozenset(id_ for id_ in ends if id_ is not None) | by_name,
        (bos_id,) if prefix and bos_id is not None else (),
        (eos_id,) if suffix and eos_id is not None else (),
    )


def _scored(meta: Metadata, model: Any, space_prefix: bool) -> tuple[Scored, tokenizers.Tokenizer]:
    tokens = meta.tokens()
    kinds = meta.kinds(len(tokens))
    scores = meta.items("scores", (float, int), MAX_TOKENS)
    if scores is None or len(scores) != len(tokens):
        raise meta.corrupt(f"tokenizer.ggml.scores does not give each of {len(tokens)} tokens a score")
    charsmap = meta.items("precompiled_charsmap", int, _MAX_CHARSMAP) if model == "unigram" else None
    unknown = meta.token_id("unknown_token_id", len(tokens))
    if unknown is not None and Kind.UNKNOWN not in kinds:
        kinds = [Kind.UNKNOWN if id_ == unknown else kind for id_, kind in enumerate(kinds)]
    pieces = Scored(
        model=model,
        texts=tokens,
        scores=scores,
        kinds=kinds,
        space_prefix=meta.get("add_space_prefix", bool, space_prefix),
        trim=model == "unigram" and meta.get("remove_extra_whitespaces", bool, False),
        charsmap=bytes(value & 0xFF for value in charsmap or ()),
        rstrip=frozenset(tokens) - _PHI3_KEEP if meta.named("phi-3", "phi3") else frozenset(),
    )
    return pieces, scored.build(pieces, meta.source)


def _llama(meta: Metadata) -> Vocab:
    """SentencePiece's BPE. Byte pieces stand for what no other piece does."""
    pieces, inner = _scored(meta, "bpe", space_prefix=True)
    return _ends(meta, inner, pieces.texts, pieces.kinds, add_bos=True, bos=1, eos=2)


def _t5(meta: Metadata) -> Vocab:
    pieces, inner = _scored(meta, "unigram", space_prefix=False)
    vocab = _ends(meta, inner, pieces.texts, pieces.kinds, add_eos=True, eos=1)
    return replace(vocab, charsmap=scored.charsmap_of(pieces, meta.source))


def _bert(meta: Metadata) -> Vocab:
    """WordPiece, whose tokens GGUF spells with a mark where a word begins instead of one where it goes on."""
    tokens = meta.tokens()
    kinds = meta.kinds(len(tokens))
    spelled = [
        token
        if kind in (Kind.CONTROL, Kind.UNKNOWN)
        else token[1:]
        if token.startswith(MARK) and len(token) > 1
        else wordpiece.CONTINUING + token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    size = len(tokens)
    first = meta.token_id("bos_token_id", size, meta.token_id("cls_token_id", size, 101))
    last, unknown = meta.token_id("seperator_token_id", size, 102), meta.token_id("unknown_token_id", size, 100)
    if first is None or last is None or unknown is None:
        raise meta.corrupt("the vocabulary lacks the token that begins, ends or stands for the unknown")
    lowercase = meta.get("normalizer.lowercase", bool, True)
    return wordpiece.build(
        spelled,
        meta.source,
        first=spelled[first],
        last=spelled[last],
        unknown=spelled[unknown],
        special=[token for token, kind in zip(spelled, kinds, strict=True) if kind in (Kind.CONTROL, Kind.UNKNOWN)],
        lowercase=lowercase,
        strip_accents=meta.get("normalizer.strip_accents", bool, lowercase),
    )


def _gpt2(meta: Metadata) -> Vocab:
    return _bpe(meta, meta.get("pre", str, "default"))


def _gemma4(meta: Metadata) -> Vocab:
    return _bpe(meta, "gemma4")


def _bpe(meta: Metadata, name: str) -> Vocab:
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        message = f"{meta.source}: GGUF pre-tokenizer {name!r:.40} is not supported (known: {known})."
        raise UnsupportedModel(message, _REMEDY)
    pre = PRE_TOKENIZERS[name]
    if meta.get("add_space_prefix", bool, False):
        raise UnsupportedModel(f"{meta.source}: add_space_prefix with a tokenizer of merges is not supported.", _REMEDY)
    tokens = meta.tokens()
    kinds = meta.kinds(len(tokens))
    merges = meta.items("merges", str, _MAX_MERGES)
    if merges is None:
        raise meta.corrupt("tokenizer.ggml.merges is missing")
    vocab = number(tokens, meta.source, "tokenizer.ggml.tokens")
    with soundness(meta.source, "vocabulary"):
        unknown = next((tokens[id_] for id_, kind in enumerate(kinds) if kind == Kind.UNKNOWN), None)
        model = models.BPE(
            vocab=vocab,
            merges=_pairs(meta, merges),
            ignore_merges=pre.ignore_merges,
            byte_fallback=pre.raw,
            fuse_unk=pre.raw,
            unk_token=unknown if pre.raw else None,
        )
        inner = tokenizers.Tokenizer(model)
        _add_pre_tokenizer(inner, pre)
        scored.add_symbols(inner, tokens, kinds)
    return _ends(meta, inner, tokens, kinds, add_bos=pre.add_bos)


def _pairs(meta: Metadata, merges: list[str]) -> list[tuple[str, str]]:
    """Merges as pairs. Whether both and what they join into are tokens is the tokenizers package's to check."""
    pairs = []
    for merge in merges:
        space = merge.find(" ", 1)
        if space < 0:
            raise meta.corrupt(f"the merge {merge!r:.60} does not join two tokens")
        pairs.append((merge[:space], merge[space + 1 :]))
    return pairs


def _add_pre_tokenizer(inner: tokenizers.Tokenizer, pre: Pre) -> None:
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated") for split in pre.splits
    ]
    if not pre.raw:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        inner.decoder = decoders.ByteLevel()
    else:
        spaces: list[decoders.Decoder] = [decoders.Replace(MARK, " ")] if pre.marks else []
        inner.decoder = decoders.Sequence([*spaces, decoders.ByteFallback(), decoders.Fuse()])
    if steps:
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.nfc:
        inner.normalizer = normalizers.NFC()
    elif pre.marks:
        inner.normalizer = normalizers.Replace(" ", MARK)


_BUILDERS: Mapping[str, Callable[[Metadata], Vocab]] = {
    "gpt2": _gpt2,
    "gemma4": _gemma4,
    "llama": _llama,
    "t5": _t5,
    "bert": _bert,
}
