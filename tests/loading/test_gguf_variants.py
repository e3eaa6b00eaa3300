"""GGUF beyond one little-endian file: the other byte order, old versions, parts, large vocabularies, mmproj."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.oracles import random_blocks
from tests.loading.checkpoints import write_gguf
from tests.loading.test_gguf import write_model
from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.kernels import BLOCKS
from tramontane.kernels.reference import ReferenceOps
from tramontane.loading.build import checked_plan, load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.gguf import GGUFFile

gguf = pytest.importorskip("gguf")

# ---- byte order -------------------------------------------------------------------------------------------------

# Blocks as C structs, where ggml-common.h has numbers of more than a byte in them.
STRUCTS: dict[str, list[tuple[str, str]]] = {
    "Q4_0": [("d", "f2"), ("qs", "16u1")],
    "Q4_1": [("d", "f2"), ("m", "f2"), ("qs", "16u1")],
    "Q5_0": [("d", "f2"), ("qh", "u4"), ("qs", "16u1")],
    "Q5_1": [("d", "f2"), ("m", "f2"), ("qh", "u4"), ("qs", "16u1")],
    "Q8_0": [("d", "f2"), ("qs", "32u1")],
    "Q2_K": [("scales", "16u1"), ("qs", "64u1"), ("d", "f2"), ("dmin", "f2")],
    "Q3_K": [("hmask", "32u1"), ("qs", "64u1"), ("scales", "12u1"), ("d", "f2")],
    "Q4_K": [("d", "f2"), ("dmin", "f2"), ("scales", "12u1"), ("qs", "128u1")],
    "Q5_K": [("d", "f2"), ("dmin", "f2"), ("scales", "12u1"), ("qh", "32u1"), ("qs", "128u1")],
    "Q6_K": [("ql", "128u1"), ("qh", "64u1"), ("scales", "16u1"), ("d", "f2")],
    "IQ4_NL": [("d", "f2"), ("qs", "16u1")],
    "IQ4_XS": [("d", "f2"), ("scales_h", "u2"), ("scales_l", "4u1"), ("qs", "128u1")],
    "TQ1_0": [("qs", "48u1"), ("qh", "4u1"), ("d", "f2")],
    "TQ2_0": [("qs", "64u1"), ("d", "f2")],
    "MXFP4": [("e", "u1"), ("qs", "16u1")],
    "NVFP4": [("d", "4u1"), ("qs", "32u1")],
}


def test_big_endian_metadata_and_numbers(tmp_path: Path) -> None:
    big = write_model(tmp_path / "big.gguf", options={"endianess": gguf.GGUFEndian.BIG})
    little = write_model(tmp_path / "little.gguf")
    with GGUFFile.open(big) as ours, GGUFFile.open(little) as same:
        assert big.read_bytes()[:8] == b"GGUF\0\0\0\3"
        assert (ours.version, ours.metadata) == (3, same.metadata)
        assert list(ours.tensors) == list(same.tensors)
        for name in ours.tensors:
            # The writer turns numbers around; of bfloat16 it gets bytes, which it does not.
            if name.startswith("plain.") and name != "plain.bf16":
                assert ours.data(name).dtype == same.data(name).dtype
                np.testing.assert_array_equal(ours.data(name), same.data(name))
                assert not ours.data(name).flags.writeable


def test_big_endian_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    expected = {name: random_blocks(rng, name, 3, 512) for name in STRUCTS}
    for name, fields in STRUCTS.items():
        blocks = expected[name].reshape(-1).view(np.dtype(fields)).byteswap().view(np.uint8).reshape(3, -1)
        assert np.dtype(fields).itemsize == BLOCKS[name].nbytes
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[name])
    bfloat16 = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    swapped = bfloat16.view(np.uint16).byteswap().view(np.uint8)
    writer.add_tensor("BF16", swapped, raw_dtype=gguf.GGMLQuantizationType.BF16)
    grids = random_blocks(rng, "IQ2_XS", 3, 512)
    writer.add_tensor("IQ2_XS", grids, raw_dtype=gguf.GGMLQuantizationType.IQ2_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "big.gguf") as file:
        for name, blocks in expected.items():
            np.testing.assert_array_equal(file.data(name), blocks, err_msg=name)
        np.testing.assert_array_equal(file.data("BF16"), bfloat16)
        with pytest.raises(UnsupportedModel, match=r"IQ2_XS.*little-endian"):
            file.data("IQ2_XS")


def test_what_gguf_turns_around_is_the_same(tmp_path: Path) -> None:
    """The converter of the gguf package, for the types that it knows."""
    scripts = pytest.importorskip("gguf.scripts.gguf_convert_endian")
    rng = np.random.default_rng(2)
    for kind, turn in scripts.byteswap_tensors.items():
        if kind.name not in STRUCTS or kind.name == "TQ2_0":
            continue
        blocks = random_blocks(rng, kind.name, 1, 1024).reshape(-1)
        ours = blocks.view(np.dtype(STRUCTS[kind.name])).byteswap().view(np.uint8)
        tensor = type("Tensor", (), {"data": blocks.copy()})
        for start in range(0, len(blocks), BLOCKS[kind.name].nbytes):
            turn(tensor, start)
        np.testing.assert_array_equal(ours, tensor.data, err_msg=kind.name)


# ---- version 1 --------------------------------------------------------------------------------------------------


def text_1(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def test_version_1(tmp_path: Path) -> None:
    strings = struct.pack("<II", 8, 2) + text_1(b"a") + text_1(b"bc")
    entries = [
        text_1(b"x.int") + struct.pack("<Ii", 5, -7),
        text_1(b"x.text") + struct.pack("<I", 8) + text_1("ä".encode()),
        text_1(b"x.strings") + struct.pack("<I", 9) + strings,
        text_1(b"x.numbers") + struct.pack("<IIIHH", 9, 2, 2, 3, 4),
    ]
    info = text_1(b"w") + struct.pack("<IIIIQ", 2, 4, 3, 0, 0)
    head = b"GGUF" + struct.pack("<III", 1, 1, len(entries)) + b"".join(entries) + info
    values = np.arange(12, dtype=np.float32)
    (tmp_path / "old.gguf").write_bytes(head + bytes(-len(head) % 32) + values.tobytes())
    with GGUFFile.open(tmp_path / "old.gguf") as file:
        assert file.version == 1
        assert file.metadata == {"x.int": -7, "x.text": "ä", "x.strings": ["a", "bc"], "x.numbers": [3, 4]}
        np.testing.assert_array_equal(file.data("w"), values.reshape(3, 4))


# ---- parts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in several files, by the gguf package."""
    write_model(tmp_path / "model.gguf", options={"split_max_tensors": 5})
    found = sorted(tmp_path.glob("model-*.gguf"))
    assert [path.name for path in found] == [f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_any_part_opens_all(parts: list[Path], tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf")
    with GGUFFile.open(whole) as one:
        for path in parts:
            with GGUFFile.open(path) as file:
                assert {key: value for key, value in file.metadata.items() if "split." not in key} == one.metadata
                assert list(file.tensors) == list(one.tensors)
                assert {tensor.part for tensor in file.tensors.values()} == {0, 1, 2}
                for name in file.tensors:
                    np.testing.assert_array_equal(file.data(name), one.data(name))
                    file.prefetch(name)
                    file.release(name)
                view = file.data("plain.f32").copy()
            np.testing.assert_array_equal(view, one.data("plain.f32"))


def test_missing_parts_are_named(parts: list[Path]) -> None:
    parts[1].unlink()
    parts[0].unlink()
    with pytest.raises(ModelNotFound, match=r"model-00001-of-00003\.gguf, model-00002-of-00003\.gguf") as caught:
        GGUFFile.open(parts[2])
    assert "one folder" in str(caught.value)


def test_parts_that_do_not_belong_together(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CorruptCheckpoint, match="name"):
        GGUFFile.open(renamed)
    renamed.rename(parts[0])
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CorruptCheckpoint, match="part 2, from 0"):
        GGUFFile.open(parts[0])
    at = parts[2].read_bytes().index(b"split.no") + len(b"split.no") + 4
    twice = bytearray(second)
    parts[1].write_bytes(twice)
    third = bytearray(second)
    assert third[at] == 1
    third[at] = 2
    parts[2].write_bytes(third)
    with pytest.raises(CorruptCheckpoint, match="another part too"):
        GGUFFile.open(parts[0])


def test_fewer_tensors_than_the_first_part_says(parts: list[Path]) -> None:
    content = parts[0].read_bytes()
    at = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    parts[0].write_bytes(content[:at] + struct.pack("<i", 99) + content[at + 4 :])
    with pytest.raises(CorruptCheckpoint, match=r"tensors together where the first says 99"):
        GGUFFile.open(parts[1])


def test_merged_files_keep_a_count_of_no_parts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "merged.gguf", uint16=("split.count", 0))
    with GGUFFile.open(path) as file:
        assert file.metadata["split.count"] == 0
    for value in ("three", -1.5):
        add = {"string": ("split.count", value)} if isinstance(value, str) else {"float32": ("split.count", value)}
        with pytest.raises(CorruptCheckpoint, match=r"name does not say"):
            GGUFFile.open(write_model(tmp_path / "odd.gguf", **add))


# ---- what is in them --------------------------------------------------------------------------------------------


def test_a_large_vocabulary_is_read_whole(tmp_path: Path) -> None:
    tokens = [f"token {i} ✓" for i in range(150_000)]
    merges = [f"a{i} b{i}" for i in range(150_000)]
    extra: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * len(tokens),
    }
    path = write_gguf(tmp_path / "large.gguf", extra)
    with GGUFFile.open(path) as file:
        assert {key: file.metadata[key] for key in extra} == extra


@pytest.mark.parametrize("key", ["general.architecture", "general.type"])
def test_mmproj_is_named_and_refused(key: str, tmp_path: Path) -> None:
    value = {"general.architecture": "clip", "general.type": "mmproj"}[key]
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "llama" if key == "general.type" else value)
    if key == "general.type":
        writer.add_string(key, value)
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        open_checkpoint(tmp_path / "mmproj.gguf") as checkpoint,
        pytest.raises(UnsupportedModel, match=r"mmproj file.*language model itself"),
    ):
        checked_plan(checkpoint)


def test_vectors_of_any_numbers_become_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    vectors = {
        "blk.0.attn_q.bias": rng.standard_normal(32),
        "blk.0.attn_k.bias": rng.integers(-9, 9, 16).astype(np.int8),
        "blk.0.attn_v.bias": rng.integers(-900, 900, 16).astype(np.int16),
        "blk.0.attn_output.bias": rng.integers(-900, 900, 32).astype(np.int32),
    }
    model = load_model(write_gguf(tmp_path / "m.gguf", tensors=vectors), ReferenceOps())
    for name, part in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        parameter = model.decoder.parameters[f"layers.0.attention.{name}.bias"]
        assert parameter.dtype == np.float32
        np.testing.assert_array_equal(parameter, vectors[f"blk.0.{part}.bias"].astype(np.float32))
