"""What tokenizer_config.json adds to a tokenizer: tokens of its own, and which token plays which part.

Owns that file's keys about tokens. Must not know: where the vocabulary came from, chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import tokenizers

from tramontane.errors import CorruptCheckpoint
from tramontane.text.vocab import Vocab

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_Value = TypeVar("_Value")


def apply(vocab: Vocab, config: Mapping[str, Any], source: str) -> Vocab:
    """`vocab` with the file's tokens added to it. Raises CorruptCheckpoint where they contradict it.

    An explicit `add_bos_token` or `add_eos_token` decides what a text gets at its ends; else `vocab` does.
    """
    ids = _add_configured_tokens(vocab.inner, config, source)
    bos_id = ids.get("bos_token", vocab.bos_id)
    eos_ids = frozenset({ids["eos_token"]}) if "eos_token" in ids else vocab.eos_ids
    eos_id = ids.get("eos_token", next(iter(vocab.eos_ids), None))
    prefix, suffix = list(vocab.prefix), list(vocab.suffix)
    for key, id_, ends in (("add_bos_token", bos_id, prefix), ("add_eos_token", eos_id, suffix)):
        wanted = _typed(config, key, bool, source)
        if wanted and id_ is None:
            raise CorruptCheckpoint(source, f"{key} is set but there is no {key[4:]}")
        if wanted is False and (id_ in ends or len(ends) == 1):
            ends.clear()  # a lone token is the one meant, also where the config calls another so
        elif wanted and id_ is not None and id_ not in ends:
            ends.insert(0 if ends is prefix else len(ends), id_)
    return replace(vocab, bos_id=bos_id, eos_ids=eos_ids, prefix=tuple(prefix), suffix=tuple(suffix))


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
    content = flags.get("content") if isinstance(flags, Mapping) else None
    broken = not isinstance(content, str) or any("\ud800" <= letter <= "\udfff" for letter in content)
    if broken or not isinstance(flags, Mapping):
        raise CorruptCheckpoint(source, f"{where} in tokenizer_config.json is {entry!r:.60}, not a token")
    return tokenizers.AddedToken(
        content,
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
    tokens = [_added_token(entry, "added_tokens_decoder", source, special=False) for _, entry in numbered]
    # All at once: the tokenizers package goes through all its added tokens each time.
    inner.add_tokens([token for token in tokens if token is not None and token.content not in known])
    for (number, entry), token in zip(numbered, tokens, strict=True):
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
