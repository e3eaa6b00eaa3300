"""Text to token ids and back, over the tokenizers package.

Owns what a model's files say about its tokenizer: which tokens begin and end a text, which are special. Must not
know: chat templates, the engine, tensors. Incremental decoding is `tramontane.text.detokenizer`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, processors

from tramontane import platform
from tramontane.errors import InvalidRequest, UnsupportedModel
from tramontane.loading.repofiles import TOKENIZERS
from tramontane.records import dataclass
from tramontane.text import configured, gguf_vocab, scored, sentencepiece, tekken, wordpiece
from tramontane.text.charsmap import Charsmap
from tramontane.text.pieces import PieceRules, rules_from_decoder
from tramontane.text.vocab import Vocab, read_file, soundness


@dataclass(frozen=True)
class Fitted:
    """A text, or two that are read together, with all that belongs at their ends."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    """Of each token: which of the two texts it belongs to, for models that are told so."""
    length: int
    """What the length of `ids` would be if nothing were cut."""

    @property
    def truncated(self) -> bool:
        return len(self.ids) < self.length


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
        charsmap: Charsmap | None = None,
        between: Sequence[int] | None = None,
        second_type: int = 0,
    ) -> None:
        """`prefix` and `suffix` are the ids that a text gets at its ends when special tokens are added; `charsmap`
        rewrites what stands between symbols before `inner` encodes it; for pairs of texts see `Vocab`."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._between = self._suffix * 2 if between is None else list(between)
        self._second_type = second_type
        self._charsmap = charsmap
        self._symbols: dict[bool, tuple[tokenizers.Tokenizer, Mapping[int, int]]] = {}
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
        """Read a `tokenizer.json`, `tekken.json`, `tokenizer.model` (SentencePiece) or `vocab.txt` (WordPiece).

        The file's name tells which. `config`: what `tokenizer_config.json` holds, if there is one; its explicit
        `add_bos_token` or `add_eos_token` decides, else the file does: a `tokenizer.json` by its post-processor; of
        SentencePiece's models BPE gives texts a BOS and unigram an EOS, as their families have it, and one of
        characters neither.
        Raises ModelNotFound, CorruptCheckpoint or UnsupportedModel.
        """
        path = Path(path)
        source = str(path)
        vocab = configured.apply(_read(path, config or {}, source), config or {}, source)
        return cls._from_vocab(vocab, source)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF metadata") -> Tokenizer:
        """Rebuild the tokenizer that a GGUF file's metadata describes. `source` names the file in errors.

        Raises CorruptCheckpoint or UnsupportedModel.
        """
        return cls._from_vocab(gguf_vocab.build(metadata, source), source)

    @classmethod
    def _from_vocab(cls, vocab: Vocab, source: str) -> Tokenizer:
        return cls(
            vocab.inner,
            source=source,
            bos_id=vocab.bos_id,
            eos_ids=vocab.eos_ids,
            prefix=vocab.prefix,
            suffix=vocab.suffix,
            charsmap=vocab.charsmap,
            between=vocab.between,
            second_type=vocab.second_type,
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
            charsmap=self._charsmap,
            between=self._between,
            second_type=self._second_type,
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
        with soundness(self.source, "tokenizer"):  # some faults show only on a text
            try:
                if self._charsmap is not None:
                    found = self._encode_rewritten(texts, self._charsmap, parse_special)
                else:
                    found = _ids(self._inner, texts) if parse_special else self._literal_ids(texts)
            except (TypeError, UnicodeError) as error:
                raise InvalidRequest("prompt", "the text is not a string of Unicode characters") from error
        return [self._with_ends(ids, parse_special) for ids in found] if add_special_tokens else found

    def _encode_rewritten(self, texts: Sequence[str], charsmap: Charsmap, parse_special: bool) -> list[list[int]]:
        """Ids of texts: symbols where they stand in the text itself, and what the rest becomes as plain text."""
        parts = [self._split(text, parse_special) for text in texts]
        plain = [charsmap.normalize(part) for text in parts for part in text if isinstance(part, str)]
        encodings = iter(self._literal_ids(plain))
        return [
            [id_ for part in text for id_ in (next(encodings) if isinstance(part, str) else [part])] for text in parts
        ]

    def _split(self, text: str, parse_special: bool) -> list[str | int]:
        """A text as ids of symbols, and the strings between them."""
        finder, symbols = self._symbol_finder(parse_special)
        found = finder.encode(text, add_special_tokens=False)
        return [
            symbols[id_] if id_ else text[start:end] for id_, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]

    def _symbol_finder(self, parse_special: bool) -> tuple[tokenizers.Tokenizer, Mapping[int, int]]:
        """The tokenizer's added tokens over a model that knows nothing, whose id 0 is whatever stands between them;
        and which tokens its other ids are."""
        with self._lock:
            if parse_special not in self._symbols:
                finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
                added = self._inner.get_added_tokens_decoder()
                finder.add_tokens(list(added.values()))
                finder.encode_special_tokens = not parse_special
                ids = {token.content: id_ for id_, token in added.items()}
                own = finder.get_added_tokens_decoder()
                self._symbols[parse_special] = finder, {id_: ids[token.content] for id_, token in own.items()}
            return self._symbols[parse_special]

    def _with_ends(self, ids: list[int], parsed: bool) -> list[int]:
        prefix, suffix = self._prefix, self._suffix
        has_prefix = parsed and ids[: len(prefix)] == prefix
        has_suffix = parsed and bool(suffix) and ids[-len(suffix) :] == suffix
        return ([] if has_prefix else prefix) + ids + ([] if has_suffix else suffix)

    def encode_within(self, texts: Sequence[str], max_length: int) -> list[Fitted]:
        """Texts with what the model wants at their ends, cut at their own end to at most `max_length` tokens in all."""
        encoded = self.encode_batch(texts, add_special_tokens=False)
        room = max(max_length - len(self._prefix) - len(self._suffix), 0)
        return [self._fitted(ids, None, min(len(ids), room), 0) for ids in encoded]

    def encode_pairs(self, first: str, seconds: Sequence[str], max_length: int) -> list[Fitted]:
        """A text read together with each of others, the longer one cut first, as transformers' `longest_first` does."""
        one, *others = self.encode_batch([first, *seconds], add_special_tokens=False)
        room = max(max_length - len(self._prefix) - len(self._between) - len(self._suffix), 0)
        return [self._fitted(one, other, *_shares(len(one), len(other), room)) for other in others]

    def _fitted(self, one: list[int], other: list[int] | None, keep: int, keep_other: int) -> Fitted:
        ids, types = [*self._prefix, *one[:keep]], 0
        first = len(ids)
        if other is not None:
            ids += self._between
            first = len(ids)
            ids += other[:keep_other]
            types = self._second_type
        ids += self._suffix
        length = len(ids) + len(one) - keep + len(other or ()) - keep_other
        return Fitted(tuple(ids), (0,) * first + (types,) * (len(ids) - first), length)

    def _literal_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which a special token's name is plain text.

        Only a tokenizer of its own sees such names as that, and large vocabularies take some 30 MB of memory. Where the
        one there is finds no special token, it has found what the other would.
        """
        found = _ids(self._inner, texts)
        named = [i for i, ids in enumerate(found) if not self.special_ids.isdisjoint(ids)]
        if named:
            with self._lock:
                self._literal = self._literal or _literal(self._inner)
            for i, ids in zip(named, _ids(self._literal, [texts[i] for i in named]), strict=True):
                found[i] = ids
        return found

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; U+FFFD stands for bytes that are no character, and ids beyond the vocabulary for nothing."""
        with soundness(self.source, "tokenizer"):
            try:
                return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
            except (OverflowError, TypeError) as error:
                raise InvalidRequest("token_ids", f"token ids must be non-negative integers ({error})") from error

    def piece(self, token_id: int, first: bool = False) -> tuple[bytes, bool]:
        """A token's bytes, and whether it is a lone fallback byte; nothing for an id beyond the vocabulary.

        `first`: the token begins a text, where some tokenizers drop the space before a word.
        """
        piece = self._pieces.get(token_id)
        if piece is None or (first and self.rules.first_differs):
            token = self._inner.id_to_token(token_id) if token_id >= 0 else None
            if token is None:
                return b"", False
            if first:
                return self.rules.split(token, first=True)
            piece = self._pieces[token_id] = self.rules.split(token)
        return piece

    def knows(self, token_id: int) -> bool:
        """Whether an id is a token's."""
        return token_id >= 0 and self._inner.id_to_token(token_id) is not None

    def id_to_bytes(self, token_id: int) -> bytes:
        """The raw bytes a token stands for, in mid-text; they may be part of a character."""
        return self.piece(token_id)[0]

    @cached_property
    def ids_by_bytes(self) -> Mapping[bytes, int]:
        """Bytes -> the token that stands for them in mid-text: no special one, and a lone fallback byte only where no
        other has that byte."""
        found: dict[bytes, int] = {}
        ordinary = sorted(id_ for id_ in self._inner.get_vocab().values() if id_ not in self.special_ids)
        for last in (True, False):
            found |= {piece: id_ for id_ in reversed(ordinary) for piece, lone in [self.piece(id_)] if lone is last}
        return found

    def token_text(self, token_id: int) -> str:
        """A token's bytes as text, for showing one token alone (logprobs, tables)."""
        return self.id_to_bytes(token_id).decode("utf-8", "replace")

    def holding(self, text: str) -> frozenset[int]:
        """The tokens whose text has `text` in it."""
        return frozenset(id_ for id_, own in enumerate(self._texts) if text in own)

    @cached_property
    def _texts(self) -> list[str]:
        return [self.token_text(id_) for id_ in range(self.vocab_size)]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as its vocabulary spells it (`<|im_end|>`), or None."""
        return self._inner.token_to_id(token)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for programs that read Hugging Face's files.

        Raises UnsupportedModel where those cannot say all that this tokenizer does.
        """
        if self._charsmap is not None:
            raise UnsupportedModel(
                f"{self.source}: the rules by which it rewrites text do not go into a tokenizer.json.",
                "Use the checkpoint's own files.",
            )
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        before, after = ([(inner.id_to_token(id_), id_) for id_ in ids] for ids in (self._prefix, self._suffix))
        if before or after:
            single = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
            named = [*dict.fromkeys(before + after)]
            inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
        names = {"bos_token": self.bos_id, "eos_token": min(self.eos_ids, default=None)}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {name: inner.id_to_token(id_) for name, id_ in names.items() if id_ is not None}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        inner.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @property
    def kind(self) -> str:
        """The model that it tokenizes by: BPE, Unigram, WordPiece or WordLevel."""
        return type(self._inner.model).__name__

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token as the vocabulary spells it: none stands for more of a normalized text."""
        return max(map(len, self._inner.get_vocab()), default=0)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets: equal fingerprints tokenize equally."""
        ends = json.dumps([self._prefix, self._suffix, self._between, self._second_type])
        rules = b"" if self._charsmap is None else self._charsmap.data
        return hashlib.sha256(f"{ends}\n{self._inner.to_str()}".encode() + rules).hexdigest()


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a checkpoint's folder that says most about its tokenizer, or None."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def _read(path: Path, config: Mapping[str, Any], source: str) -> Vocab:
    data = read_file(path)
    name = path.name.lower()
    if name.endswith(".txt"):
        return wordpiece.read_vocab_txt(data, config, source)
    if ".model" in name:
        model = sentencepiece.parse(data, source)
        fairseq = name == "sentencepiece.bpe.model"
        if fairseq:
            model = sentencepiece.in_fairseqs_order(model, config, source)
        inner = scored.build(model.pieces, source)
        bos, eos = ([] if id_ is None else [id_] for id_ in (model.bos_id, model.eos_id))
        return Vocab(
            inner,
            model.bos_id,
            frozenset(eos),
            prefix=tuple(bos if fairseq or model.pieces.model == "bpe" else ()),
            suffix=tuple(eos if model.pieces.model == "unigram" else ()),
            charsmap=scored.charsmap_of(model.pieces, source),
        )
    if "tekken" in name:
        return tekken.build(data, source)
    with soundness(source, "tokenizer.json"):
        inner = tokenizers.Tokenizer.from_buffer(data)
        inner.no_truncation()
        inner.no_padding()
        prefix, suffix = _ends(inner)
        between, second_type = _between(inner, len(prefix), len(suffix))
    return Vocab(inner, prefix=prefix, suffix=suffix, between=between, second_type=second_type)


def _shares(one: int, other: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept: the shorter one whole where that leaves the other as many, else half each
    (the odd one goes to the longer)."""
    if one + other <= room:
        return one, other
    shorter, longer = sorted((one, other))
    if shorter > room // 2:
        shorter, longer = room // 2, room - room // 2
    else:
        longer = room - shorter
    return (longer, shorter) if one > other else (shorter, longer)


def _ids(inner: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    # The "fast" call only leaves out offsets, which nobody here reads.
    return [encoding.ids for encoding in inner.encode_batch_fast(list(texts), add_special_tokens=False)]


def _literal(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy to which a special token's name is plain text.

    Models that look up whole strings would find it in their vocabulary even so: there the names are made unguessable.
    """
    written = inner.to_str()
    if isinstance(inner.model, (models.Unigram, models.WordLevel)):
        written = _with_names_of_no_text(written)
    literal = tokenizers.Tokenizer.from_str(written)
    literal.encode_special_tokens = True
    platform.trim_heap()  # its making takes several times what it keeps
    return literal


def _with_names_of_no_text(written: str) -> str:
    """A tokenizer.json with other names for its special tokens."""
    content = json.loads(written)
    model, added = content["model"], content["added_tokens"]
    key = f"\ufdd0{secrets.token_hex(16)}"
    names = {token["content"]: key + token["content"] for token in added if token["special"]}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(word, word): id_ for word, id_ in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return json.dumps(content)


def _ends(inner: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's post-processor puts before and after a text, found on a short one."""
    plain = inner.encode("a", add_special_tokens=False).ids
    full = inner.encode("a").ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def _between(inner: tokenizers.Tokenizer, prefix: int, suffix: int) -> tuple[tuple[int, ...], int]:
    """What the file's post-processor puts between two texts, and the type of the second."""
    plain = inner.encode("a", add_special_tokens=False).ids
    full = inner.encode("a", "a")
    start, end = prefix + len(plain), len(full.ids) - suffix - len(plain)
    return tuple(full.ids[start:end]), full.type_ids[end] if 0 <= end < len(full.type_ids) else 0
