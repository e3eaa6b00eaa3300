"""GGML's llama files from before GGUF, written by the tests' own writer."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.oracles import random_blocks
from tests.loading import old_ggml
from tests.loading.old_ggml import llama_tensors, plain, vocabulary, write
from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.kernels.blocks import dequantize
from tramontane.kernels.reference import ReferenceOps
from tramontane.loading.build import load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.ggml import GGMLFile
from tramontane.text.tokenizer import Tokenizer

TOKENS = vocabulary()


def saved(tmp_path: Path, content: bytes, name: str = "llama-7b.bin") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("kind", "version"), [("ggjt", 1), ("ggjt", 2), ("ggjt", 3), ("ggmf", 1), ("ggml", 0)])
def test_every_container(kind: str, version: int, tmp_path: Path) -> None:
    values = llama_tensors(len(TOKENS))
    path = saved(tmp_path, write(plain(values), TOKENS, kind, version))
    with GGMLFile.open(path) as file:
        metadata = file.metadata
        assert list(file.tensors)[:5] == [
            *("token_embd.weight", "output_norm.weight", "output.weight"),
            *("blk.0.attn_q.weight", "blk.0.attn_k.weight"),
        ]
        assert file.tensors["blk.1.ffn_down.weight"].shape == (64, 96)
        for name, expected in (
            ("blk.1.ffn_down.weight", values["layers.1.feed_forward.w2.weight"].astype(np.float16)),
            ("blk.0.attn_norm.weight", values["layers.0.attention_norm.weight"]),
        ):
            np.testing.assert_array_equal(file.data(name), expected)
            assert not file.data(name).flags.writeable
            file.prefetch(name)
            file.release(name)
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == "llama-7b"
    assert metadata["general.description"].startswith(kind)
    assert {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")} == {
        "block_count": 2,
        "embedding_length": 64,
        "vocab_size": len(TOKENS),
        "rope.dimension_count": 16,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "feed_forward_length": 96,
        "context_length": 2048,
        "attention.layer_norm_rms_epsilon": 5e-6,
    }
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert metadata["tokenizer.ggml.tokens"][258:262] == ["<0xFF>", "▁the", "▁a", "er"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert metadata["tokenizer.ggml.token_type"][259:] == [1] * (len(TOKENS) - 259)
    assert metadata["tokenizer.ggml.scores"] == [score for _, score in TOKENS]


def test_blocks_of_today(tmp_path: Path) -> None:
    values = llama_tensors(len(TOKENS), hidden=256, inner=512)
    tensors = plain(values)
    rng = np.random.default_rng(5)
    kinds = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13}
    names = [name for name in tensors if name.startswith("layers.") and len(tensors[name][1]) == 2]
    stored = {}
    for (kind, number), name in zip(kinds.items(), names, strict=False):
        shape = tensors[name][1]
        stored[name] = (kind, random_blocks(rng, kind, *shape))
        tensors[name] = (number, shape, stored[name][1].tobytes())
    path = saved(tmp_path, write(tensors, TOKENS, hidden=256))
    model = load_model(path, ReferenceOps())
    assert (model.formats["layers.0.attention.q"], model.formats["layers.1.attention.k"]) == ("Q4_0", "Q5_K")
    assert model.spec.layers[0].attention.rope.interleaved
    with open_checkpoint(path) as checkpoint:
        for tensor, (kind, blocks) in stored.items():
            name = old_name(tensor)
            assert checkpoint.tensors[name].format == kind
            np.testing.assert_array_equal(checkpoint.array(name), blocks)
            assert np.isfinite(dequantize(kind, checkpoint.array(name))).all()
    model.checkpoint.close()


def old_name(tensor: str) -> str:
    _, layer, rest = tensor.split(".", 2)
    short = {
        "attention.wq": "attn_q",
        "attention.wk": "attn_k",
        "attention.wv": "attn_v",
        "attention.wo": "attn_output",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
    }
    return f"blk.{layer}.{short[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize(
    ("kind", "version", "number", "format"),
    [
        ("ggjt", 2, 2, "Q4_0"),
        ("ggjt", 2, 3, "Q4_1"),
        ("ggjt", 2, 8, "Q8_0"),
        ("ggjt", 1, 6, "Q5_0"),
        ("ggmf", 1, 2, "Q4_0"),
        ("ggml", 0, 3, "Q4_1"),
        ("ggjt", 3, 4, "ggml type 4"),
        ("ggjt", 3, 23, "IQ4_XS"),
    ],
)
def test_layouts_that_were_given_up_are_refused(
    kind: str, version: int, number: int, format: str, tmp_path: Path
) -> None:
    tensors = plain(llama_tensors(len(TOKENS)))
    tensors["layers.0.attention.wq.weight"] = (number, (64, 64), bytes(64 * 64))
    with pytest.raises(UnsupportedModel, match=rf"{format}.*convert_hf_to_gguf"):
        open_checkpoint(saved(tmp_path, write(tensors, TOKENS, kind, version)))


def test_grouped_keys_mean_llama_2(tmp_path: Path) -> None:
    with GGMLFile.open(saved(tmp_path, write(plain(llama_tensors(len(TOKENS), kv_heads=2)), TOKENS))) as file:
        assert file.metadata["llama.attention.head_count_kv"] == 2
        assert file.metadata["llama.context_length"] == 4096
        assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5


def test_other_models_and_several_files_are_refused(tmp_path: Path) -> None:
    other = {"transformer.wte.weight": (0, (4, 64), bytes(4 * 64 * 4))}
    with pytest.raises(UnsupportedModel, match="not of a llama"):
        open_checkpoint(saved(tmp_path, write(other, TOKENS)))
    path = saved(tmp_path, write(plain(llama_tensors(len(TOKENS))), TOKENS, "ggmf", 1), "first.bin")
    saved(tmp_path, b"more", "first.bin.1")
    with pytest.raises(UnsupportedModel, match="several ggmf files"):
        open_checkpoint(path)
    with pytest.raises(UnsupportedModel, match="version 4"):
        open_checkpoint(saved(tmp_path, write({}, TOKENS, version=4)))
    with pytest.raises(ModelNotFound):
        GGMLFile.open(tmp_path / "none.bin")
    extra = plain(llama_tensors(len(TOKENS))) | {"layers.0.more.weight": (0, (4,), bytes(16))}
    checkpoint = open_checkpoint(saved(tmp_path, write(extra, TOKENS)))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.more"):
        checkpoint.bindings(checkpoint.spec())


def damaged() -> dict[str, bytes]:
    good = write(plain(llama_tensors(len(TOKENS))), TOKENS)
    tensors = plain(llama_tensors(len(TOKENS)))
    at = 8 + 28
    return {
        "empty": b"",
        "magic": b"xxxx" + good[4:],
        "header": good[:20],
        "vocabulary": good[:8] + struct.pack("<I", 1 << 31) + good[12:],
        "token": good[:at] + struct.pack("<I", 1 << 31) + good[at + 4 :],
        "score": good[: at + 4 + 5] + struct.pack("<f", float("nan")) + good[at + 4 + 9 :],
        "truncated": good[:-1],
        "trailing": good + b"more",
        "dimensions": good + struct.pack("<3I", 9, 1, 0) + bytes(64),
        "name": good + struct.pack("<3I", 1, 1 << 31, 0) + bytes(64),
        "twice": write(tensors, TOKENS) + write({"norm.weight": (0, (64,), bytes(256))}, [])[36:],
        "no elements": write(tensors | {"more.weight": (0, (0, 4), b"")}, TOKENS),
        "half a block": write(tensors | {"more.weight": (2, (2, 48), bytes(54))}, TOKENS),
        "heads": write(tensors, TOKENS, heads=5),
        "no heads": good[:20] + struct.pack("<I", 0) + good[24:],
    }


@pytest.mark.parametrize("case", damaged())
def test_corrupt(case: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint):
        GGMLFile.open(saved(tmp_path, damaged()[case]))


def test_where_the_tests_writer_puts_tensors() -> None:
    """The offsets of ggjt: a tensor begins at a multiple of 32, in the older ones right behind its name."""
    tensors: old_ggml.Tensors = {"norm.weight": (0, (8,), np.arange(8, dtype=np.float32).tobytes())}
    for kind, version, start in (("ggjt", 3, 64), ("ggmf", 1, 36 + 12 + 4 + 11)):
        content = write(tensors, [], kind, version)
        assert content[start : start + 32] == np.arange(8, dtype=np.float32).tobytes()
        assert len(content) == start + 32


@pytest.mark.parametrize("kind", ["ggjt", "ggml"])
def test_the_embedded_vocabulary_is_a_tokenizer(kind: str, tmp_path: Path) -> None:
    words = vocabulary(("▁t", "he", "▁the", "▁", "t", "h", "e", "a"))
    with GGMLFile.open(saved(tmp_path, write(plain(llama_tensors(len(words))), words, kind))) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    ids = {token: number for number, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    # The best merge first: "▁t" and "he", and of these "▁the".
    assert tokenizer.encode("the a") == [1, ids["▁the"], ids["▁"], ids["a"]]
    assert tokenizer.encode("é") == [1, ids["▁"], ids["<0xC3>"], ids["<0xA9>"]]
    assert tokenizer.decode(tokenizer.encode("the aé")[1:]) == "the aé"
