"""BERT's WordPiece tokenizer, from a list of tokens.

Owns its pipeline and `vocab.txt`. Must not know: what its tokens were read from. Source: the published tokenizer.json
of BERT's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tramontane.errors import CorruptCheckpoint
from tramontane.text.vocab import Vocab, number, soundness

CONTINUING = "##"
_NAMED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build(
    tokens: Sequence[str],
    source: str,
    *,
    unknown: str = "[UNK]",
    first: str = "[CLS]",
    last: str = "[SEP]",
    special: Sequence[str] = _NAMED,
    lowercase: bool = True,
    strip_accents: bool | None = None,
) -> Vocab:
    """The tokenizer; texts stand between `first` and `last`. `strip_accents` is by default as `lowercase`.

    Raises CorruptCheckpoint for tokens that make no vocabulary, or lack a named one.
    """
    ids = number(tokens, source, "the vocabulary")
    for name in (unknown, first, last):
        if name not in ids:
            raise CorruptCheckpoint(source, f"the vocabulary has no {name!r:.40}")
    with soundness(source, "vocabulary"):
        model = models.WordPiece(ids, unk_token=unknown, continuing_subword_prefix=CONTINUING)
        inner = tokenizers.Tokenizer(model)
        inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(prefix=CONTINUING)
        known = [name for name in dict.fromkeys(special) if name in ids]
        inner.add_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in known])
    ends = (ids[first],), (ids[last],)
    return Vocab(inner, ids[first], frozenset({ids[last]}), *ends, between=ends[1], second_type=1)


def read_vocab_txt(data: bytes, config: Mapping[str, Any], source: str) -> Vocab:
    """Read a `vocab.txt`, one token a line. `config`: what tokenizer_config.json holds (`do_lower_case`, ...)."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(source, "not UTF-8") from error
    tokens = [line.rstrip("\r") for line in (lines[:-1] if lines and not lines[-1] else lines)]
    lowercase, accents = config.get("do_lower_case", True), config.get("strip_accents")
    for key, value in (("do_lower_case", lowercase), ("strip_accents", accents)):
        if not (isinstance(value, bool) or value is None):
            raise CorruptCheckpoint(source, f"{key} in tokenizer_config.json is {value!r:.40}, not true or false")
    return build(tokens, source, lowercase=bool(lowercase), strip_accents=accents)
