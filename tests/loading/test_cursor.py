"""Strings of a file's header: the compiled module and Python read and refuse the same."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import pytest

from tramontane.errors import CorruptCheckpoint
from tramontane.loading import cursor
from tramontane.loading.cursor import Cursor

TEXTS = [b"", b"a", "Ġhé".encode(), b"\xff\xc3", b"\0" * 300, "𝔘".encode()]


def opened(path: Path, data: bytes, order: str = "<", size: str = "Q") -> Cursor:
    path.write_bytes(data)
    with open(path, "rb") as file:
        made = Cursor("it", mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), len(data))
    made.at, made.order, made.size = 3, order, size
    return made


def written(order: str, size: str) -> bytes:
    return b"abc" + b"".join(struct.pack(order + size, len(text)) + text for text in TEXTS)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("order", "size"), [("<", "Q"), ("<", "I"), (">", "Q"), (">", "I")])
def test_strings_of_any_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, order: str, size: str
) -> None:
    if not compiled:
        monkeypatch.setattr(cursor, "_native", None)
    data = written(order, size)
    reading = opened(tmp_path / "file", data + b"more", order, size)
    assert reading.strings(len(TEXTS)) == [text.decode("utf-8", "surrogateescape") for text in TEXTS]
    assert reading.at == len(data)
    assert reading.strings(0) == []


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (written("<", "Q")[:-1], "string 5 of an array claims 4 bytes"),
        (written("<", "Q")[:-5], "an array of 6 strings ends after 5"),
        (b"abc" + b"\xff" * 8 + b"rest", f"string 0 of an array claims {2**64 - 1} bytes"),
        (b"abc", "an array of 6 strings ends after 0"),
    ],
)
def test_what_is_not_inside_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, data: bytes, words: str
) -> None:
    if not compiled:
        monkeypatch.setattr(cursor, "_native", None)
    with pytest.raises(CorruptCheckpoint, match=words):
        opened(tmp_path / "file", data).strings(len(TEXTS))


def test_the_compiled_module_reads_no_further_than_it_may() -> None:
    native = pytest.importorskip("tramontane._native")
    for at, end, width in ((0, 5, 8), (5, 4, 8), (0, 4, 3)):
        with pytest.raises(ValueError, match="strings"):
            native.read_strings(b"abcd", at, end, 1, width)
    assert native.read_strings(struct.pack("<I", 2) + b"ab" * 2, 0, 6, 5, 4) == (["ab"], 6)
