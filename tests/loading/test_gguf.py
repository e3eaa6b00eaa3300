"""GGUF files written by the gguf package, read by ours; and hundreds of damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.loading.ggml_types import GGML_TYPES
from tramontane.loading.gguf import GGUFFile

gguf = pytest.importorskip("gguf")

BLOCKS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "Q5_K", "IQ4_XS")


def write_model(path: Path, *, options: dict[str, Any] | None = None, **extra: Any) -> Path:
    """A small file with every value type and many tensor types; random bytes stand for blocks.

    `options` are the writer's; what it writes big-endian has its blocks as they are.
    """
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama", **(options or {}))
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -5)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 1 << 31)
    writer.add_int32("t.i32", -(1 << 31))
    writer.add_uint64("t.u64", 1 << 63)
    writer.add_int64("t.i64", -(1 << 63))
    writer.add_float32("t.f32", 0.5)
    writer.add_float64("t.f64", 1e-300)
    writer.add_bool("t.bool", True)
    writer.add_string("t.string", "Größe ✓")
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.25, -1.5])
    writer.add_array("t.bools", [True, False])
    writer.add_array("t.strings", ["Ġa", "", "b" * 300])
    for key, value in extra.items():
        getattr(writer, f"add_{key}")(*value)
    for name, dtype in (("f32", np.float32), ("f16", np.float16), ("i8", np.int8), ("i32", np.int32), ("f64", "f8")):
        writer.add_tensor(f"plain.{name}", (rng.standard_normal((3, 5)) * 50).astype(dtype))
    writer.add_tensor("plain.vector", np.arange(7, dtype=np.float32))
    writer.add_tensor("plain.cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor(
        "plain.bf16", rng.integers(0, 256, (2, 12), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
    )
    for name in BLOCKS:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        codes = rng.integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
        writer.add_tensor(f"block.{name}", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf")


def assert_as_reference(path: Path) -> None:
    """Shapes, formats, offsets and bytes of every tensor equal to those of the gguf package's reader."""
    reference = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for theirs in reference.tensors:
            ours, data = file.tensors[theirs.name], file.data(theirs.name)
            assert ours.shape == tuple(reversed(theirs.shape.tolist()))
            assert (ours.format, ours.nbytes) == (theirs.tensor_type.name, theirs.n_bytes)
            assert ours.offset == theirs.data_offset
            assert np.array_equal(data.reshape(-1).view(np.uint8), theirs.data.reshape(-1).view(np.uint8))
            assert not data.flags.writeable


def test_tensors_equal_the_reference_reader(model: Path) -> None:
    assert_as_reference(model)


def test_metadata_of_every_type(model: Path) -> None:
    with GGUFFile.open(model) as file:
        metadata = file.metadata
        assert file.version == 3
    assert metadata["general.architecture"] == "llama"
    assert {key[2:]: value for key, value in metadata.items() if key.startswith("t.")} == {
        "u8": 200,
        "i8": -5,
        "u16": 60000,
        "i16": -30000,
        "u32": 1 << 31,
        "i32": -(1 << 31),
        "u64": 1 << 63,
        "i64": -(1 << 63),
        "f32": 0.5,
        "f64": 1e-300,
        "bool": True,
        "string": "Größe ✓",
        "ints": [1, -2, 3],
        "floats": [0.25, -1.5],
        "bools": [True, False],
        "strings": ["Ġa", "", "b" * 300],
    }
    assert type(metadata["t.u8"]) is int
    assert type(metadata["t.bool"]) is bool
    assert type(metadata["t.ints"][0]) is int


def test_data_shapes_and_dtypes(model: Path) -> None:
    with GGUFFile.open(model) as file:
        assert file.data("plain.cube").tolist() == np.arange(24.0).reshape(2, 3, 4).tolist()
        assert file.data("plain.bf16").dtype.name == "bfloat16"
        assert file.data("plain.bf16").shape == file.tensors["plain.bf16"].shape == (2, 6)
        assert file.data("block.Q4_K").dtype == np.uint8
        assert file.data("block.Q4_K").shape == (3, 2 * 144)
        assert file.tensors["block.Q4_K"].shape == (3, 512)


def test_views_share_the_map_and_outlive_the_file(model: Path) -> None:
    file = GGUFFile.open(model)
    first, second = file.data("plain.f32"), file.data("plain.f32")
    assert np.shares_memory(first, second)
    before = first.copy()
    file.prefetch("plain.f32")
    file.release("plain.f32")
    file.close()
    assert np.array_equal(first, before)
    with pytest.raises(ValueError, match="closed"):
        file.data("plain.f32")


def test_type_table_is_ggmls() -> None:
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {number: (kind.name, kind.block, kind.nbytes) for number, kind in GGML_TYPES.items()}
    # Older packages lack the newest types, and none knows that Q8_1's two scales became halves.
    shared = ours.keys() & theirs.keys() - {9}
    assert {number: ours[number] for number in shared} == {number: theirs[number] for number in shared}
    assert {number for number in theirs if number <= 30} <= set(ours)


def test_other_alignment(tmp_path: Path) -> None:
    assert_as_reference(write_model(tmp_path / "aligned.gguf", custom_alignment=(64,)))


@pytest.mark.slow
def test_real_model(smollm2: Path) -> None:
    assert_as_reference(smollm2)
    with GGUFFile.open(smollm2) as file:
        assert len(file.metadata["tokenizer.ggml.tokens"]) == file.metadata["llama.vocab_size"] == 49152


# ---- files made by hand -----------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(
    entries: tuple[bytes, ...] = (), infos: tuple[bytes, ...] = (), data: int = 0, version: int = 3, counts: Any = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(infos), len(entries))))
    head += b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


def opened(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "made.gguf"
    path.write_bytes(content)
    return GGUFFile.open(path)


def test_version_2_and_an_empty_model(tmp_path: Path) -> None:
    file = opened(tmp_path, build((entry(b"a", 4, struct.pack("<I", 3)),), version=2))
    assert (file.version, file.metadata, file.tensors) == (2, {"a": 3}, {})


def test_nested_arrays(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2B", 0, 2, 5, 6)
    file = opened(tmp_path, build((entry(b"a", 9, struct.pack("<IQ", 9, 2) + inner + inner),)))
    assert file.metadata["a"] == [[5, 6], [5, 6]]


def test_token_bytes_round_trip(tmp_path: Path) -> None:
    tokens = [b"ok", b"\xff\xfe", "ä".encode()]
    value = struct.pack("<IQ", 8, 3) + b"".join(map(text, tokens))
    file = opened(tmp_path, build((entry(b"tokens", 9, value),)))
    assert [token.encode("utf-8", "surrogateescape") for token in file.metadata["tokens"]] == tokens


def test_unknown_tensor_type_is_listed_and_refused_on_use(tmp_path: Path) -> None:
    file = opened(tmp_path, build((), (info(b"new", (32,), 4444, 0),), 32))
    assert file.tensors["new"].format == "ggml type 4444"
    with pytest.raises(UnsupportedModel, match="ggml type 4444"):
        file.data("new")


HUGE = 1 << 62
INT = struct.pack("<I", 1)
CORRUPT = {
    "tensor count": build(counts=(HUGE, 0)),
    "entry count": build(counts=(0, HUGE)),
    "header cut": b"GGUF" + struct.pack("<I", 3),
    "key length": build((struct.pack("<Q", HUGE),)),
    "empty key": build((entry(b"", 4, INT),)),
    "key twice": build((entry(b"a", 4, INT), entry(b"a", 4, INT))),
    "key not utf-8": build((entry(b"\xff", 4, INT),)),
    "value type": build((entry(b"a", 13, INT),)),
    "boolean": build((entry(b"a", 7, b"\2"),)),
    "string length": build((entry(b"a", 8, struct.pack("<Q", HUGE)),)),
    "string not utf-8": build((entry(b"a", 8, text(b"\xff")),)),
    "array length": build((entry(b"a", 9, struct.pack("<IQ", 0, HUGE)),)),
    "array of strings": build((entry(b"a", 9, struct.pack("<IQ", 8, 1 << 40)),)),
    "array of unknown": build((entry(b"a", 9, struct.pack("<IQ", 99, 1)),)),
    "array of booleans": build((entry(b"a", 9, struct.pack("<IQB", 7, 1, 3)),)),
    "nesting": build((entry(b"a", 9, struct.pack("<IQ", 9, 1) * 50),)),
    "alignment 0": build((entry(b"general.alignment", 4, struct.pack("<I", 0)),)),
    "alignment 24": build((entry(b"general.alignment", 4, struct.pack("<I", 24)),)),
    "alignment text": build((entry(b"general.alignment", 8, text(b"32")),)),
    "no dimension": build((), (info(b"w", (), 0, 0),), 64),
    "five dimensions": build((), (info(b"w", (1,) * 5, 0, 0),), 64),
    "zero dimension": build((), (info(b"w", (4, 0), 0, 0),), 64),
    "huge dimension": build((), (info(b"w", (HUGE, 4), 0, 0),), 64),
    "product beyond 64 bits": build((), (info(b"w", (1 << 32, 1 << 32, 2), 0, 0),), 64),
    "row of half blocks": build((), (info(b"w", (48, 2), 2, 0),), 640),
    "offset": build((), (info(b"w", (4,), 0, HUGE),), 64),
    "offset unaligned": build((), (info(b"w", (4,), 0, 16),), 64),
    "truncated": build((), (info(b"w", (4,), 0, 32),), 32),
    "overlap": build((), (info(b"v", (16,), 0, 0), info(b"w", (4,), 0, 32)), 128),
    "name twice": build((), (info(b"w", (4,), 0, 0), info(b"w", (4,), 0, 32)), 64),
    "name empty": build((), (info(b"", (4,), 0, 0),), 64),
    "empty": b"",
    "html": b"<!DOCTYPE html><html></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt(case: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"made\.gguf"):
        opened(tmp_path, CORRUPT[case])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"PK\x03\x04rest", "zip"),
        (struct.pack("<Q", 10) + b'{"a": 1}  ', "safetensors"),
        (bytes(100), "zeros"),
        (b"some other thing", "unknown kind"),
    ],
)
def test_says_what_a_wrong_file_is(content: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=kind):
        opened(tmp_path, content)


def test_unsupported(tmp_path: Path) -> None:
    for version in (0, 4, 4 << 24, 99):
        with pytest.raises(UnsupportedModel, match=f"version {version};"):
            opened(tmp_path, build(version=version))


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelNotFound):
            GGUFFile.open(path)
