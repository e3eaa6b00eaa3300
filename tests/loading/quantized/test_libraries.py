"""Against the libraries that define the formats: files that they wrote, and their own dequantization in float32.

Each live test is skipped where its library is not installed (compressed-tensors, bitsandbytes, hqq, mlx, gptqmodel,
awq, llmcompressor, mlx_lm); small modules that they wrote are kept in `golden/` and always read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.modules import make
from tests.loading.quantized import libraries
from tests.loading.quantized.libraries import CASES, GOLDEN, Packed
from tramontane.loading.build import LoadedModel, load_model
from tramontane.loading.quantized import collect, method_of
from tramontane.loading.safetensors import SafetensorsFolder
from tramontane.loading.tensors import TensorEntry
from tramontane.weights import make_weight

torch = pytest.importorskip("torch", reason="torch is not installed")


def values(folder: Path, packed: Packed) -> Any:
    """What this build makes of one module's tensors in a file: float32 [N, K]."""
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    save_file({f"m.{name}": tensor.contiguous().clone() for name, tensor in packed.tensors.items()}, file)
    stored = SafetensorsFolder.open(file)
    entries = {name: TensorEntry(info.shape, info.dtype, info.nbytes) for name, info in stored.tensors.items()}
    method = method_of({packed.key: packed.settings}, "config.json")
    assert method is not None
    _, matrices = collect(method, entries, stored.data, "model.safetensors")
    matrix = matrices["m.weight"]
    weight = make_weight(make("reference"), matrix.format, matrix.shape, matrix.load())
    assert weight.nbytes == matrix.nbytes
    return weight.dequantize()


def check(folder: Path, packed: Packed) -> None:
    ours = values(folder, packed)
    if packed.rounded:
        ours = torch.from_numpy(ours).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours, packed.values)


@pytest.mark.parametrize("name", CASES)
def test_modules_of_libraries(name: str, tmp_path: Path) -> None:
    check(tmp_path, CASES[name]())


@pytest.mark.parametrize("name", GOLDEN)
def test_modules_that_libraries_wrote(name: str, tmp_path: Path) -> None:
    packed = libraries.golden(name)
    assert name.startswith(packed.library.split()[0])
    check(tmp_path, packed)


# ---- whole checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama and its tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("plain")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = Tokenizer(models.BPE({chr(48 + id_): id_ for id_ in range(128)}, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder


def quantized(folder: Path) -> tuple[LoadedModel, dict[str, Any]]:
    """A written checkpoint, and its quantized matrices as plain values by their names in the file."""
    loaded = load_model(folder, make("reference"))
    found = {}
    for name, format in loaded.formats.items():
        weight: Any = loaded.decoder.parameters[name]
        if format not in ("F32", "F16", "BF16"):
            found[loaded.bindings[name].tensor] = weight.dequantize()
    return loaded, found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"])
def test_checkpoints_of_llm_compressor(scheme: str, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor", reason="llmcompressor is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    model.save_pretrained(tmp_path / "m", save_compressed=True)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    _, ours = quantized(tmp_path / "m")
    assert len(ours) == 14
    for name, found in ours.items():
        module = name.removesuffix("weight")
        own = {key.removeprefix(module): tensor for key, tensor in stored.items() if key.startswith(module)}
        scheme_ = model.get_submodule(module.rstrip(".")).quantization_scheme
        theirs = BaseCompressor.get_value_from_registry(scheme_.format).decompress(own, scheme_)["weight"]
        if theirs.dtype == torch.bfloat16:
            found = torch.from_numpy(found).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(found, theirs.float().numpy(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4, nested", "int8"])
def test_checkpoints_of_bitsandbytes(kind: str, plain: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": "nested" in kind}
    settings = {"load_in_8bit": True} if kind == "int8" else four
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "m")
    _, ours = quantized(tmp_path / "m")
    assert len(ours) == 14
    for name, found in ours.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        if kind == "int8":
            theirs = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            weight.quant_state.shape = torch.Size((1, found.size))
            theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).reshape(found.shape)
        np.testing.assert_array_equal(found, theirs.float().numpy(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_checkpoints_of_mlx_lm(bits: int, plain: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx_lm is not installed")
    mlx_lm.convert(str(plain), str(tmp_path / "m"), quantize=True, q_group_size=64, q_bits=bits, dtype="float32")
    stored = mx.load(str(tmp_path / "m" / "model.safetensors"))
    _, ours = quantized(tmp_path / "m")
    assert len(ours) == 16
    for name, found in ours.items():
        module = name.removesuffix(".weight")
        own = (stored[name], stored[f"{module}.scales"], stored[f"{module}.biases"])
        np.testing.assert_array_equal(found, np.array(mx.dequantize(*own, group_size=64, bits=bits)), err_msg=name)
