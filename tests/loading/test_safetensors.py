"""Safetensors files written by the safetensors package, read by ours; and hundreds of damaged ones."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.loading.safetensors import DTYPES, SafetensorsFolder


def sample() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
    tensors = {name: (rng.standard_normal((3, 5)) * 30).astype(name) for name in names}
    tensors["bool"] = rng.integers(0, 2, (4,)).astype(bool)
    tensors["bfloat16"] = rng.standard_normal((2, 7)).astype(ml_dtypes.bfloat16)
    tensors["scalar"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 4), np.float32)
    return tensors


def test_equals_the_reference(tmp_path: Path) -> None:
    save_file(sample(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference = load_file(tmp_path / "model.safetensors")
    with SafetensorsFolder.open(tmp_path) as folder:
        assert folder.metadata == {"format": "pt"}
        assert folder.tensors.keys() == reference.keys()
        for name, theirs in reference.items():
            ours, entry = folder.data(name), folder.tensors[name]
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes()
            assert entry.nbytes == theirs.nbytes
            assert entry.shape == theirs.shape
            assert not ours.flags.writeable
            assert ours.flags.aligned
        first, second = folder.data("float32"), folder.data("float32")
        assert np.shares_memory(first, second)
        folder.prefetch("float32")
        folder.release("float32")
    assert np.array_equal(first, reference["float32"])
    with pytest.raises(ValueError, match="closed"):
        folder.data("float32")


def test_eight_bit_floats_against_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.arange(-8, 8, dtype=torch.float32)
    tensors = {"e4": values.to(torch.float8_e4m3fn), "e5": values.to(torch.float8_e5m2), "b": values.bfloat16()}
    save_torch(tensors, tmp_path / "x.safetensors")
    with SafetensorsFolder.open(tmp_path / "x.safetensors") as file:
        for name, theirs in tensors.items():
            assert file.data(name).astype(np.float32).tolist() == theirs.float().tolist()


def shards(folder: Path) -> dict[str, str]:
    save_file({"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.int8)}, folder / "model-1-of-2.safetensors")
    save_file({"c": np.full(4, 7, np.float16)}, folder / "model-2-of-2.safetensors")
    return {"a": "model-1-of-2.safetensors", "b": "model-1-of-2.safetensors", "c": "model-2-of-2.safetensors"}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    write_index(tmp_path, shards(tmp_path))
    with SafetensorsFolder.open(tmp_path) as folder:
        assert sorted(folder.tensors) == ["a", "b", "c"]
        assert folder.data("c").tolist() == [7.0] * 4
        assert folder.tensors["c"].file == tmp_path / "model-2-of-2.safetensors"


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 3, "sub/x.safetensors"]
)
def test_index_stays_in_its_folder(shard: Any, tmp_path: Path) -> None:
    write_index(tmp_path, {**shards(tmp_path), "d": shard})
    with pytest.raises(CorruptCheckpoint, match="no file of the folder"):
        SafetensorsFolder.open(tmp_path)


def test_wrong_index(tmp_path: Path) -> None:
    names = shards(tmp_path)
    for weight_map, word in (
        ({**names, "d": "model-9-of-9.safetensors"}, "not there: model-9-of-9"),
        ({**names, "d": names["c"]}, "'d'"),
        ([], "weight_map"),
    ):
        write_index(tmp_path, weight_map)
        with pytest.raises(CorruptCheckpoint, match=word):
            SafetensorsFolder.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"no model\.safetensors\.index"):
        SafetensorsFolder.open(tmp_path)


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(ModelNotFound):
            SafetensorsFolder.open(path)


@pytest.mark.slow
def test_real_model(stories15m: Path) -> None:
    reference = load_file(stories15m / "model.safetensors")
    with SafetensorsFolder.open(stories15m) as folder:
        assert folder.tensors.keys() == reference.keys()
        assert all(np.array_equal(folder.data(name), theirs) for name, theirs in reference.items())


# ---- files made by hand -----------------------------------------------------------------------------------------


def build(header: bytes | dict[str, Any], data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(shape: Any, begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def opened(tmp_path: Path, content: bytes) -> SafetensorsFolder:
    path = tmp_path / "made.safetensors"
    path.write_bytes(content)
    return SafetensorsFolder.open(path)


BIG = 1 << 62
CORRUPT = {
    "empty": b"",
    "short": b"\x01\x00",
    "header beyond file": struct.pack("<Q", BIG) + b"{}",
    "html": b"<!DOCTYPE html><html></html>",
    "json": build(b"{'a': 1}"),
    "not utf-8": build(b'{"\xff": 1}'),
    "more than json": build(b"{}]"),
    "deep": build(b'{"a":' + b"[" * 100_000),
    "long number": build(b'{"a":' + b"9" * 10_000 + b"}"),
    "twice": build(
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1
    ),
    "entry": build({"a": 3}),
    "entry keys": build({"a": {"dtype": "F32", "shape": []}}),
    "metadata": build({"__metadata__": {"a": 1}}),
    "shape type": build({"a": entry("2", 0, 8)}, 8),
    "shape float": build({"a": entry([2.0], 0, 8)}, 8),
    "shape bool": build({"a": entry([True], 0, 4)}, 4),
    "negative": build({"a": entry([-2], 0, 8)}, 8),
    "huge": build({"a": entry([BIG, BIG, BIG], 0, 8)}, 8),
    "empty but huge": build({"a": entry([0, BIG, BIG], 0, 0)}),
    "many dimensions": build({"a": entry([1] * 100, 0, 4)}, 4),
    "size": build({"a": entry([2], 0, 12)}, 12),
    "backwards": build({"a": entry([2], 8, 0)}, 8),
    "beyond": build({"a": entry([2], 0, 8)}, 4),
    "trailing": build({"a": entry([2], 0, 8)}, 12),
    "hole": build({"a": entry([2], 4, 12)}, 12),
    "overlap": build({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),
    "dtype type": build({"a": entry([2], 0, 8, 7)}, 8),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt(case: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"made\.safetensors"):
        opened(tmp_path, CORRUPT[case])


def test_element_types(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'F128'"):
        opened(tmp_path, build({"a": entry([1], 0, 16, "F128")}, 16))
    file = opened(tmp_path, build({"a": entry([4], 0, 2, "F4")}, 2))
    with pytest.raises(UnsupportedModel, match="F4"):
        file.data("a")
    assert {np.dtype(dtype).itemsize for dtype in DTYPES.values()} == {1, 2, 4, 8}


def test_odd_addresses_are_copied_to_even_ones(tmp_path: Path) -> None:
    file = opened(tmp_path, build({"a": entry([1], 0, 1, "U8"), "b": entry([2], 1, 9)}, 9))
    assert file.data("b").flags.aligned
    assert file.data("b").tolist() == [0.0, 0.0]


def mutate(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    kind = rng.choice(("cut", "flip", "digit", "digit", "size", "move"))
    if kind == "cut":
        return bytes(damaged[: rng.randrange(len(damaged))])
    if kind == "flip":
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif kind == "digit":
        at = rng.choice([i for i in range(8, header) if chr(damaged[i]).isdigit()])
        damaged[at : at + 1] = rng.choice((b"0", b"9", b"-1", b"1e9", b"true", b"99999999999999999999"))
        damaged[:8] = struct.pack("<Q", header - 8 + len(damaged) - len(content))
    elif kind == "size":
        size = rng.choice((0, 1, header - 9, header, len(content), 1 << 27, 1 << 40, (1 << 64) - 1))
        damaged[:8] = struct.pack("<Q", size)
    else:
        at, length = rng.randrange(8, header), rng.randrange(1, 64)
        damaged[at : at + length] = damaged[rng.randrange(8, header) :][:length]
    return bytes(damaged)


def test_damage_is_survived(tmp_path: Path) -> None:
    save_file(sample(), tmp_path / "sound.safetensors")
    content, path = (tmp_path / "sound.safetensors").read_bytes(), tmp_path / "damaged.safetensors"
    rng = random.Random(4)
    refused = 0
    tracemalloc.start()
    for _ in range(700):
        path.write_bytes(mutate(content, rng))
        try:
            with SafetensorsFolder.open(path) as file:
                for name in file.tensors:
                    file.data(name)
        except (CorruptCheckpoint, UnsupportedModel):
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 400 < refused < 700
    assert peak < 4 << 20
