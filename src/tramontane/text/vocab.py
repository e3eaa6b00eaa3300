"""A tokenizer put together from a model's files, and the checks that every kind of file needs.

Owns what the readers of the several formats hand to `Tokenizer`. Must not know: any one format, templates, tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path

import tokenizers

from tramontane.errors import CorruptCheckpoint, ModelNotFound, TramontaneError
from tramontane.loading.mapped import read_small
from tramontane.records import dataclass
from tramontane.text.charsmap import Charsmap

MAX_TOKENS = 1 << 21  # the largest known vocabularies have 2**18
MAX_TOKEN_CHARS = 4096
_MAX_MERGE_WORK = 1 << 31  # letters looked at while deriving merges; Gemma's 262,144 pieces take 2**24
_MAX_FILE_BYTES = 256 << 20  # the largest known tokenizer.json has 33 MB


@dataclass(frozen=True)
class Vocab:
    """`inner` encodes without the ends; `prefix` and `suffix` are what a text gets at its ends when asked for.

    `charsmap`: what the text between symbols becomes before `inner` sees it.
    `between` stands between two texts that are read together (None: the suffix twice, as RoBERTa has it); the second
    and what follows it are of type `second_type`.
    """

    inner: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: frozenset[int] = field(default_factory=frozenset)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    charsmap: Charsmap | None = None
    between: tuple[int, ...] | None = None
    second_type: int = 0


def read_file(path: Path) -> bytes:
    """A tokenizer file's bytes. Raises ModelNotFound, or CorruptCheckpoint for one of absurd size."""
    if not path.is_file():
        raise ModelNotFound(str(path), "no such tokenizer file")
    return read_small(path, _MAX_FILE_BYTES)


@contextmanager
def soundness(source: str, what: str) -> Iterator[None]:
    """Whatever the tokenizers package says of the data it is given, panics included, becomes CorruptCheckpoint."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TramontaneError):
            raise
        raise CorruptCheckpoint(source, f"not a sound {what}: {error}") from error
    except BaseException as error:
        # A panic in the tokenizers package reaches Python as a BaseException of a class that cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise CorruptCheckpoint(source, f"not a sound {what}: {error}") from error


def number(tokens: Sequence[str], source: str, where: str) -> dict[str, int]:
    """Ids of tokens by their order. Raises CorruptCheckpoint for none, doubles, empty, endless or broken ones."""
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise CorruptCheckpoint(source, f"{where} has {len(tokens)} entries; 1 to {MAX_TOKENS} can be meant")
    ids = {token: id_ for id_, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        again = next(token for id_, token in enumerate(tokens) if ids[token] != id_)
        raise CorruptCheckpoint(source, f"{where} lists {again!r:.60} more than once")
    if max(map(len, tokens)) > MAX_TOKEN_CHARS or "" in ids:
        raise CorruptCheckpoint(source, f"{where} holds an empty token or one of more than {MAX_TOKEN_CHARS} letters")
    try:
        "".join(tokens).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorruptCheckpoint(source, f"{where} holds text that is not Unicode") from error
    return ids


def derive_merges(ordered: Sequence[str], ids: Mapping[str, int], source: str) -> list[tuple[str, str]]:
    """All pairs of tokens of `ids` that make a token, in the order of the tokens they make; ties by the pair's ids."""
    if sum(len(token) ** 2 for token in ordered) > _MAX_MERGE_WORK:
        raise CorruptCheckpoint(source, "the vocabulary's tokens are too long to be meant")
    merges: list[tuple[str, str]] = []
    for token in ordered:
        pairs = [
            (token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids
        ]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])) if len(pairs) > 1 else pairs
    return merges
