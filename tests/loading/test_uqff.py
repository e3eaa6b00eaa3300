"""UQFF: files written from its description in every format, the container's rules, and files of mistral.rs itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.kernels.oracles import random_blocks
from tests.loading.checkpoints import hf_tensors
from tests.loading.quantized import writers
from tests.loading.quantized.cases import LLAMA
from tests.models.harness import Rig
from tramontane.errors import CorruptCheckpoint, ModelNotFound, TramontaneError, UnsupportedModel
from tramontane.kernels.reference import ReferenceOps, dequantize
from tramontane.loading.build import LoadedModel, load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.sources import ModelSource, resolve
from tramontane.models.decoder import Decoder
from tramontane.weights import make_weight

OPS = ReferenceOps()
Tensors = dict[str, NDArray[Any]]

# ---- written from the description -------------------------------------------------------------------------------

DTYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q8_1": 9}


def u8(value: int) -> NDArray[np.uint8]:
    return np.array(value, np.uint8)


def u32(*values: int) -> NDArray[np.uint32]:
    return np.array(values, np.uint32) if len(values) > 1 else np.array(values[0], np.uint32)


def ggml(rng: np.random.Generator, n: int, k: int, format: str) -> tuple[Tensors, NDArray[Any]]:
    blocks = random_blocks(rng, format, n, k)
    tensors = {"": blocks.reshape(-1), ".format": u8(0), ".dtype": u32(DTYPES[format]), ".shape": u32(n, k)}
    return tensors, dequantize(format, blocks)


def ggml_floats(rng: np.random.Generator, n: int, k: int, number: int) -> tuple[Tensors, NDArray[Any]]:
    dtype = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}[number]
    values = rng.standard_normal((n, k)).astype(dtype)
    raw = np.frombuffer(values.tobytes(), np.uint8)
    return {"": raw, ".format": u8(0), ".dtype": u32(number), ".shape": u32(n, k)}, values.astype(np.float32)


def dense(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, NDArray[Any]]:
    values = rng.standard_normal((n, k)).astype(np.float32)
    return {"": values, ".format": u8(1)}, values


def hqq(rng: np.random.Generator, n: int, k: int, bits: int, axis: int = 0) -> tuple[Tensors, NDArray[Any]]:
    own, values = writers.hqq(rng, n, k, bits=bits, group=64, axis=axis, dtype=np.float32)
    return {
        "": own["W_q"],
        ".format": u8(2),
        ".scales": own["scale"],
        ".zeros": own["zero"],
        ".shape": u32(n, k),
        ".bits": u8(bits),
        ".axis": u8(axis),
        ".round_zeros": u8(0),
        ".channel_wise": u8(1),
        ".group_size": u32(64),
        ".optimization_steps": u32(10),
    }, values


def fp8(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, NDArray[Any]]:
    codes, scale = writers.fp8_codes(rng, n, k), np.array(0.0024038462, np.float32)
    scales = {f".{name}": scale for name in ("dequant_w_scale", "dequant_x_scale", "quant_scale")}
    return {"": codes, ".format": u8(3), ".dtype": u32(9), **scales}, codes.astype(np.float32) * scale


def afq(rng: np.random.Generator, n: int, k: int, bits: int) -> tuple[Tensors, NDArray[Any]]:
    own, values = writers.mlx(rng, n, k, bits=bits, group=32, dtype=np.float32)
    own = {"": own["weight"], ".scales": own["scales"], ".biases": own["biases"]}
    return {**own, ".format": u8(4), ".bits": u8(bits), ".group_size": u8(32)}, values


def f8q8(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, NDArray[Any]]:
    count = -(-n * k // 32)
    scale = rng.uniform(0.1, 3, (count, 1)).astype(ml_dtypes.float8_e4m3fn)
    codes = rng.integers(-127, 128, (count, 32), dtype=np.int8)
    raw = np.concatenate((scale.view(np.uint8), codes.view(np.uint8)), axis=1).reshape(-1)
    values = codes.astype(np.float32) * (scale.astype(np.float32) / np.float32(416))
    tensors = {"": raw, ".format": u8(5), ".num_blocks": u32(count), ".shape": u32(n, k)}
    return tensors, values.reshape(-1)[: n * k].reshape(n, k)


def mxfp4(rng: np.random.Generator, n: int, k: int) -> tuple[Tensors, NDArray[Any]]:
    own, values = writers.mxfp4(rng, n, k)
    return {"": own["weight_packed"], ".scales": own["weight_scale"], ".format": u8(6)}, values


WRITERS: dict[str, Any] = {
    **{name: lambda rng, n, k, name=name: ggml(rng, n, k, name) for name in DTYPES},
    **{f"GGML-{i}": lambda rng, n, k, i=i: ggml_floats(rng, n, k, i) for i in (0, 1, 30)},
    "dense": dense,
    **{f"HQQ{bits}": lambda rng, n, k, bits=bits: hqq(rng, n, k, bits) for bits in (1, 2, 3, 4, 8)},
    "HQQ4-axis1": lambda rng, n, k: hqq(rng, n, k, 4, 1),
    "FP8": fp8,
    **{f"AFQ{bits}": lambda rng, n, k, bits=bits: afq(rng, n, k, bits) for bits in (2, 3, 4, 6, 8)},
    "F8Q8": f8q8,
    "MXFP4": mxfp4,
}
VERSION = {"uqff.version.major": u32(1), "uqff.version.minor": u32(2), "uqff.version.patch": u32(0)}


def write(folder: Path, name: str, shards: int = 1, **changes: Any) -> Tensors:
    """A checkpoint with every matrix as `WRITERS[name]` has it; the plain values. `changes` replace tensors."""
    rng = np.random.default_rng(4)
    plain, residual, layers = hf_tensors(LLAMA), Tensors(), Tensors(VERSION)
    for tensor, values in plain.items():
        if values.ndim == 1:
            residual[tensor] = values
            continue
        own, plain[tensor] = WRITERS[name](rng, *values.shape)
        layers.update({f"{tensor}{ending}": np.array(array, order="C") for ending, array in own.items()})
    for tensor, change in changes.items():
        layers.pop(tensor, None)
        if change is not None:
            layers[tensor] = change
    folder.mkdir(parents=True)
    names = list(layers)
    for shard in range(shards):
        save_file({tensor: layers[tensor] for tensor in names[shard::shards]}, folder / f"q-{shard}.uqff")
    save_file(residual, folder / "residual.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return plain


@pytest.mark.parametrize("name", WRITERS)
def test_values_are_exact(name: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "m", name)
    loaded = load_model(tmp_path / "m", OPS)
    assert loaded.checkpoint.kind == "uqff"
    for canonical, binding in loaded.bindings.items():
        tensor = binding.tensor
        parameter: Any = loaded.decoder.parameters[canonical]
        values = parameter.dequantize() if plain[tensor].ndim == 2 else parameter
        np.testing.assert_array_equal(values, plain[tensor], err_msg=tensor)
        if plain[tensor].ndim == 2:
            assert loaded.checkpoint.tensors[tensor].nbytes == parameter.nbytes


@pytest.mark.parametrize("shards", [2, 11])
def test_shards_are_one_model_from_the_folder_or_any_of_them(shards: int, tmp_path: Path) -> None:
    write(tmp_path / "m", "Q8_0", shards)
    formats = load_model(tmp_path / "m", OPS).formats
    for path in (tmp_path / "m" / "q-0.uqff", tmp_path / "m" / f"q-{shards - 1}.uqff"):
        assert load_model(path, OPS).formats == formats
        assert resolve(str(path)) == path
    assert resolve(ModelSource.uqff(tmp_path / "m")) == tmp_path / "m"
    (tmp_path / "m" / "q-1.uqff").unlink()
    if shards > 2:
        with pytest.raises(CorruptCheckpoint, match=r"q-0\.uqff.*\[0, 2, 3"):
            open_checkpoint(tmp_path / "m")


def test_two_models_in_a_folder_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "m", "Q8_0")
    (tmp_path / "m" / "other-0.uqff").write_bytes((tmp_path / "m" / "q-0.uqff").read_bytes())
    with pytest.raises(ModelNotFound, match=r"2 UQFF models: other, q"):
        open_checkpoint(tmp_path / "m")
    load_model(tmp_path / "m" / "other-0.uqff", OPS)


@pytest.mark.parametrize("version", [(1, 0, 0), (1, 1, 9), (1, 2, 0), (1, 2, 7)])
def test_older_minor_versions_load(version: tuple[int, int, int], tmp_path: Path) -> None:
    write(tmp_path / "m", "Q8_0", **{name: u32(v) for name, v in zip(VERSION, version, strict=True)})
    load_model(tmp_path / "m", OPS)


@pytest.mark.parametrize("version", [(0, 9, 0), (2, 0, 0), (1, 3, 0)])
def test_other_versions_are_refused(version: tuple[int, int, int], tmp_path: Path) -> None:
    write(tmp_path / "m", "Q8_0", **{name: u32(v) for name, v in zip(VERSION, version, strict=True)})
    with pytest.raises(UnsupportedModel, match=rf"UQFF {version[0]}\.{version[1]}.*1\.0 to 1\.2"):
        load_model(tmp_path / "m", OPS)


@pytest.mark.parametrize("change", [None, np.zeros(2, np.uint32), np.zeros((), np.float32)])
def test_a_missing_version_is_corrupt(change: Any, tmp_path: Path) -> None:
    write(tmp_path / "m", "Q8_0", **{"uqff.version.major": change})
    with pytest.raises(CorruptCheckpoint, match=r"no uqff\.version\.major"):
        load_model(tmp_path / "m", OPS)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Q8_0", {".format": u8(9)}, "format 9 of UQFF"),
        ("Q8_0", {".dtype": u32(77)}, "GGML type 77"),
        ("Q8_0", {".dtype": u32(2)}, "bytes for 128 x 64 in Q4_0"),
        ("Q8_0", {".shape": u32(128, 4096)}, "bytes for 128 x 4096"),
        ("Q8_0", {".shape": u32(0, 64)}, "shape says 0 x 64"),
        ("Q8_0", {".shape": None}, "no weight.shape"),
        ("HQQ4", {".bits": u8(7)}, "7 bits"),
        ("HQQ4", {".group_size": u32(48)}, "groups of 48"),
        ("FP8", {".dequant_w_scale": None}, "no weight.dequant_w_scale"),
        ("AFQ4", {".group_size": u8(0)}, "groups of 0"),
        ("F8Q8", {".shape": u32(64, 64)}, r"weight has shape"),
        ("MXFP4", {".scales": np.zeros((128, 3), np.uint8)}, "scales has shape"),
    ],
)
def test_modules_that_lie_are_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m", name, **{f"{UP}{ending}": change for ending, change in changes.items()})
    with pytest.raises(TramontaneError, match=f"(?s)up_proj.*{message}"):
        load_model(tmp_path / "m", OPS)


# ---- files of mistral.rs ----------------------------------------------------------------------------------------

PROMPTS = [
    *("Once upon a time", "The little dog was", "She went to", "Tom and Lily", "A big red ball", "One day, a girl"),
    *("The sun", "Mom said", "He was very happy because", "They played in the park", "A bird", "In the end, the boy"),
]
TOKENS = 10
WHEEL = """
import json, sys
from mistralrs import CompletionRequest, Runner, Which

model, out, kind, prompts, tokens = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), int(sys.argv[5])
runner = Runner(Which.Plain(model_id=model, write_uqff=out + "/m.uqff"), in_situ_quant=kind)
texts = []
for prompt in prompts:
    request = CompletionRequest(model="default", prompt=prompt, max_tokens=tokens, temperature=0.0, top_k=1)
    texts.append(runner.send_completion_request(request).choices[0].text)
print("TEXTS" + json.dumps(texts))
"""
# Kind -> the largest error of a matrix relative to its size, by format.
ERRORS = {
    "Q4_0": 0.11, "Q4_1": 0.1, "Q5_0": 0.06, "Q5_1": 0.05, "Q8_0": 0.012, "Q8_1": 0.01, "Q2_K": 0.33, "Q3_K": 0.2,
    "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03, "Q8_K": 0.01, "F32": 0.0, "FP8": 0.03, "FP4": 0.23,
    "INT2": 0.5, "INT3": 0.22, "INT4": 0.11, "INT6": 0.03, "INT8": 0.03,
}  # fmt: skip
KINDS = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0", "Q8_1": "Q8_1",
    "Q2K": "Q2_K", "Q3K": "Q3_K", "Q4K": "Q4_K", "Q5K": "Q5_K", "Q6K": "Q6_K", "Q8K": "Q8_K",
    "HQQ4": "INT4", "HQQ8": "INT8", "FP8": "FP8", "F8Q8": "INT8", "MXFP4": "FP4",
    "AFQ2": "INT2", "AFQ3": "INT3", "AFQ4": "INT4", "AFQ6": "INT6", "AFQ8": "INT8",
}  # fmt: skip
"""What the wheel calls a kind of quantization -> the format that most of its matrices are kept in."""


class Rounding(ReferenceOps):
    """Activations rounded to 8 bits in blocks of 32 before each product, as the wheel's kernels do."""

    def _product(self, out: Any, x: Any, *rest: Any) -> None:
        blocks = x.reshape(-1, 32)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
        rounded = np.round(blocks / np.where(scale == 0, 1, scale)) * scale
        super()._product(out, rounded.reshape(x.shape).astype(np.float32), *rest)


def rebuilt(loaded: LoadedModel, ops: ReferenceOps, plain: bool) -> Decoder:
    """The same decoder on other ops, its matrices as they are or as the floats that they stand for."""
    parameters: dict[str, Any] = {}
    for name, parameter in loaded.decoder.parameters.items():
        if name in loaded.formats:
            weight: Any = parameter
            tensors = {"weight": weight.dequantize()} if plain else weight.tensors()
            parameter = make_weight(ops, "F32" if plain else weight.format, weight.shape, tensors)
        parameters[name] = parameter
    return Decoder(loaded.spec, parameters, ops)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_mistralrs(kind: str, stories15m: Path, tmp_path: Path) -> None:
    """Values near the original's, logits those of the values, greedy text the wheel's while the two likeliest tokens
    are further apart than what rounding activations to 8 bits moves logits."""
    pytest.importorskip("mistralrs", reason="mistralrs is not installed")
    from tramontane.text.tokenizer import Tokenizer

    arguments = [str(stories15m), str(tmp_path), kind, json.dumps(PROMPTS), str(TOKENS)]
    run = subprocess.run([sys.executable, "-c", WHEEL, *arguments], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    texts = json.loads(run.stdout.rsplit("TEXTS", 1)[1])

    loaded = load_model(tmp_path, OPS)
    original = load_file(stories15m / "model.safetensors")
    assert KINDS[kind] in loaded.formats.values()
    for name, format in loaded.formats.items():
        weight: Any = loaded.decoder.parameters[name]
        wanted = original[loaded.bindings[name].tensor]
        error = np.sqrt(np.square(weight.dequantize() - wanted).mean() / np.square(wanted).mean())
        assert error <= ERRORS[format], (name, format, error)

    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json", dict(loaded.checkpoint.tokenizer_config))
    exact = Rig(loaded.decoder, num_blocks=64)
    values = Rig(rebuilt(loaded, OPS, plain=True), num_blocks=64)
    rounded = Rig(rebuilt(loaded, Rounding(), plain=False), num_blocks=64)
    compared = 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer.encode(prompt)
        sequences = [rig.sequence() for rig in (exact, values, rounded)]
        fed, ours = list(ids), list[int]()
        while len(ours) < TOKENS:
            steps = [rig.step((s, fed))[0][-1] for rig, s in zip((exact, values, rounded), sequences, strict=True)]
            logits, plain, noisy = steps
            np.testing.assert_allclose(logits, plain, rtol=0, atol=2e-4 * np.abs(plain).max())
            second, first = np.sort(logits)[-2:]
            if first - second <= 2 * np.abs(logits - noisy).max():
                break
            fed = [int(logits.argmax())]
            ours += fed
        own = tokenizer.decode(ids + ours)[len(tokenizer.decode(ids)) :]
        assert text.startswith(own.rstrip("�")), (prompt, own, text)
        compared += len(ours)
    assert compared >= 4
