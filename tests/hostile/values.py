"""What a case is made of, and the values and texts that JSON of it is damaged with."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.text.hostile import mutate_bytes, mutate_value

NAN, INF = float("nan"), float("inf")
NESTED = b'{"a":' * 100_000, b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900
VALUES: Sequence[Any] = (
    *(None, True, False, -1, 0, 1, 3, 7, 65, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63),
    *(2**64, -(2**63), 10**400, -0.0, 0.5, 1e-300, 1e300, NAN, INF, -INF, "", "a", "4096", "nan", "\ud800", "\u202e\0"),
    *("x" * 100_000, [], [0], [-1], [None], [[]], [1e308], {}, {"a": 1}, ["a", 1, None], [2**40, 2**40], "../../x"),
)


@dataclass(frozen=True)
class Link:
    """A symbolic link, in place of a file's bytes."""

    to: str


Content = bytes | Link
Case = Mapping[str, Content]
"""A model's files by name."""


_TEXTS: Sequence[bytes] = (
    *NESTED,
    *(
        b"",
        b" ",
        b"null",
        b"[]",
        b"{}",
        b"3",
        b'"x"',
        b"{",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\0}\0",
        b"{'a': 1}",
        b"\0" * 99,
    ),
    *(
        b'{"a": 1e999999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": NaN, "a": -Infinity}',
        b'{"\\ud800": "\\udfff"}',
        b"\x80",
    ),
    *(b'{"a": "' + b"x" * 5_000_000 + b'"}', b"{" + b",".join(b'"%d": 0' % i for i in range(200_000)) + b"}"),
    b"[" + b"[],".join([b""] * 500_000) + b"0]",
)


def _values_set(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON object, at most two levels down, replaced by one of VALUES."""
    data = json.loads(content)
    inner = data
    for _ in range(2):
        key = rng.choice(list(inner))
        if not isinstance(inner[key], dict) or not inner[key] or rng.random() < 0.3:
            break
        inner = inner[key]
    inner[key] = rng.choice(VALUES)
    return json.dumps(data).encode()


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    if kind < 5:
        return _values_set(content, rng)
    if kind < 8:
        return json.dumps(mutate_value(json.loads(content), rng)).encode()
    if kind == 8:
        return rng.choice(_TEXTS)
    return mutate_bytes(content, rng)
