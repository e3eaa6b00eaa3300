"""Text to token ids and back, over the tokenizers package.

Owns what a model's files say about its tokenizer: which tokens begin and end a text, which are special. Must not
know: chat templates, the engine, tensors. Incremental decoding is `tramontane.text.detokenizer`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from tramontane.errors import CorruptCheckpoint, InvalidRequest, ModelNotFound
from tramontane.text import gguf_vocab
from tramontane.text.pieces import PieceRules, rules_from_decoder

_MAX_FILE_BYTES = 256 << 20  # the largest known tokenizer.json has 33 MB
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_Value = TypeVar("_Value")


class Tokenizer:
    """A model's tokenizer. Immutable and safe to use from several threads.

    `rules` says how tokens become bytes; `special_ids` are left out of decoded text unless asked for.
    Build one with `from_file` or `from_gguf`.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        source: str,
        bos_id: int | None,
        eos_ids: Iterable[int],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        """`prefix` and `suffix` are the ids that a text gets at its ends when special tokens are added."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._pieces: dict[int, tuple[bytes, bool]] = {}
        self._lock = threading.Lock()
        self._literal: tokenizers.Tokenizer | None = None
        self.source = source
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        decoder = inner.decoder
        self.rules: PieceRules = rules_from_decoder(json.loads(decoder.__getstate__()) if decoder else None, source)
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.vocab_size = max([inner.get_vocab_size() - 1, *added]) + 1

    @classmethod
    def from_file(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`. `config`: what `tokenizer_config.json` holds, if there is one.

        An explicit `add_bos_token` or `add_eos_token` decides; else the file's post-processor does.
        Raises ModelNotFound, CorruptCheckpoint or UnsupportedModel.
        """
        path, config = Path(path), config or {}
        if not path.is_file():
            raise ModelNotFound(str(path), "no such tokenizer file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CorruptCheckpoint(str(path), f"{path.stat().st_size} bytes are too many for a tokenizer")
        inner = _read(path)
        ids = _add_configured_tokens(inner, config, str(path))
        prefix, suffix = _ends(inner)
        for key, name, ends in (("add_bos_token", "bos_token", prefix), ("add_eos_token", "eos_token", suffix)):
            wanted, id_ = _typed(config, key, bool, str(path)), ids.get(name)
            if wanted and id_ is None:
                raise CorruptCheckpoint(str(path), f"{key} is set but there is no {name}")
            if wanted is False:
                ends[:] = [end for end in ends if end != id_]
            elif wanted and id_ is not None and id_ not in ends:
                ends.insert(0 if ends is prefix else len(ends), id_)
        eos = ids.get("eos_token")
        eos_ids = () if eos is None else (eos,)
        return cls(inner, source=str(path), bos_id=ids.get("bos_token"), eos_ids=eos_ids, prefix=prefix, suffix=suffix)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF metadata") -> Tokenizer:
        """Rebuild the tokenizer that a GGUF file's metadata describes. `source` names the file in errors.

        Raises CorruptCheckpoint or UnsupportedModel.
        """
        vocab = gguf_vocab.build(metadata, source)
        for wanted, id_, name in ((vocab.add_bos, vocab.bos_id, "bos"), (vocab.add_eos, vocab.eos_id, "eos")):
            if wanted and id_ is None:
                raise CorruptCheckpoint(source, f"add_{name}_token is set but {name}_token_id is missing")
        eos_ids = vocab.eot_ids | ({vocab.eos_id} if vocab.eos_id is not None else set())
        return cls(
            vocab.inner,
            source=source,
            bos_id=vocab.bos_id,
            eos_ids=eos_ids,
            prefix=[vocab.bos_id] if vocab.add_bos and vocab.bos_id is not None else [],
            suffix=[vocab.eos_id] if vocab.add_eos and vocab.eos_id is not None else [],
        )

    def with_eos_ids(self, ids: Iterable[int]) -> Tokenizer:
        """The same tokenizer with more tokens that end a text (those of generation_config.json)."""
        return Tokenizer(
            self._inner,
            source=self.source,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids.union(ids),
            prefix=self._prefix,
            suffix=self._suffix,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` puts what the model wants at the ends (BOS, ...), unless the text has it there already.
        `parse_special=False` reads a special token's name in the text as the plain text it is.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts, in parallel."""
        inner = self._inner if parse_special else self._literal_inner()
        try:
            # The "fast" call only leaves out offsets, which nobody here reads.
            encodings = inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest("prompt", "the text is not a string of Unicode characters") from error
        if not add_special_tokens:
            return [encoding.ids for encoding in encodings]
        return [self._with_ends(encoding.ids, parse_special) for encoding in encodings]

    def _with_ends(self, ids: list[int], parsed: bool) -> list[int]:
        prefix, suffix = self._prefix, self._suffix
        has_prefix = parsed and ids[: len(prefix)] == prefix
        has_suffix = parsed and bool(suffix) and ids[-len(suffix) :] == suffix
        return ([] if has_prefix else prefix) + ids + ([] if has_suffix else suffix)

    def _literal_inner(self) -> tokenizers.Tokenizer:
        """A copy that does not see special tokens: the setting is a tokenizer's state, not a call's."""
        with self._lock:
            if self._literal is None:
                literal = tokenizers.Tokenizer.from_str(self._inner.to_str())
                literal.encode_special_tokens = True
                self._literal = literal
            return self._literal

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; U+FFFD stands for bytes that are no character, and ids beyond the vocabulary for nothing."""
        try:
            return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidRequest("token_ids", f"token ids must be non-negative integers ({error})") from error

    def piece(self, token_id: int) -> tuple[bytes, bool]:
        """A token's bytes, and whether it is a lone fallback byte; nothing for an id beyond the vocabulary."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._inner.id_to_token(token_id) if token_id >= 0 else None
            if token is None:
                return b"", False
            piece = self._pieces[token_id] = self.rules.split(token)
        return piece

    def id_to_bytes(self, token_id: int) -> bytes:
        """The raw bytes a token stands for, in mid-text; they may be part of a character."""
        return self.piece(token_id)[0]

    def token_text(self, token_id: int) -> str:
        """A token's bytes as text, for showing one token alone (logprobs, tables)."""
        return self.id_to_bytes(token_id).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as its vocabulary spells it (`<|im_end|>`), or None."""
        return self._inner.token_to_id(token)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets: equal fingerprints tokenize equally."""
        ends = json.dumps([self._prefix, self._suffix])
        return hashlib.sha256(f"{ends}\n{self._inner.to_str()}".encode()).hexdigest()


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise CorruptCheckpoint(str(path), f"not a readable tokenizer.json: {error}") from error
    except BaseException as error:
        # A panic in the tokenizers package reaches Python as a BaseException of a class that cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise CorruptCheckpoint(str(path), f"not a sound tokenizer.json: {error}") from error


def _typed(config: Mapping[str, Any], key: str, kind: type[_Value], source: str) -> _Value | None:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise CorruptCheckpoint(source, f"{key} in tokenizer_config.json is {value!r:.60}, not a {kind.__name__}")
    return value


def _added_token(entry: object, where: str, source: str, special: bool = True) -> tokenizers.AddedToken | None:
    """A token as tokenizer_config.json writes it: its text, or an object with `content` and flags."""
    if entry is None:
        return None
    flags = {"content": entry} if isinstance(entry, str) else entry
    if not isinstance(flags, Mapping) or not isinstance(flags.get("content"), str):
        raise CorruptCheckpoint(source, f"{where} in tokenizer_config.json is {entry!r:.60}, not a token")
    return tokenizers.AddedToken(
        flags["content"],
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", False)),
        special=bool(flags.get("special", special)),
    )


def _add_configured_tokens(inner: tokenizers.Tokenizer, config: Mapping[str, Any], source: str) -> dict[str, int]:
    """Tell the tokenizer of tokens that only tokenizer_config.json names; return the ids of the named ones.

    Tokens which the tokenizer knows as added ones keep its flags. A token of another id than the file's own order
    gives it would be a checkpoint that contradicts itself.
    """
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    decoder = _typed(config, "added_tokens_decoder", dict, source) or {}
    try:
        numbered = sorted(((int(key), entry) for key, entry in decoder.items()), key=lambda item: item[0])
    except (TypeError, ValueError) as error:
        raise CorruptCheckpoint(source, "added_tokens_decoder has keys that are no token ids") from error
    for number, entry in numbered:
        token = _added_token(entry, "added_tokens_decoder", source, special=False)
        if token is not None and token.content not in known:
            inner.add_tokens([token])
        if token is None or inner.token_to_id(token.content) != number:
            raise CorruptCheckpoint(source, f"added_tokens_decoder gives the token {entry!r:.60} the id {number}")
    known.update(token.content for token in inner.get_added_tokens_decoder().values())
    ids: dict[str, int] = {}
    for name in _NAMED_TOKENS:
        token = _added_token(config.get(name), name, source)
        if token is None:
            continue
        id_ = inner.token_to_id(token.content)
        if id_ is None:  # never added: the model would have no embedding for it
            if name in ("bos_token", "eos_token"):
                raise CorruptCheckpoint(source, f"{name} {token.content!r:.60} is not in the vocabulary")
            continue
        token.special = True
        if token.content not in known:
            inner.add_tokens([token])
        ids[name] = id_
    return ids


def _ends(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the file's post-processor puts before and after a text, found on a short one."""
    plain = inner.encode("a", add_special_tokens=False).ids
    full = inner.encode("a").ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
