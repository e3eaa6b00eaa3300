"""Against the libraries that define the formats: files that they wrote, and their own dequantization in float32.

Each test is skipped where its library is not installed: compressed-tensors, bitsandbytes, hqq, mlx, gptqmodel, awq.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.modules import make
from tramontane.loading.quantized import collect, method_of
from tramontane.loading.safetensors import SafetensorsFolder
from tramontane.loading.tensors import TensorEntry
from tramontane.weights import make_weight

torch = pytest.importorskip("torch", reason="torch is not installed")


def values(folder: Path, tensors: dict[str, Any], settings: dict[str, Any], key: str = "quantization_config") -> Any:
    """What this build makes of one module's tensors in a file: float32 [N, K]."""
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    save_file({f"m.{name}": tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    stored = SafetensorsFolder.open(file)
    entries = {name: TensorEntry(info.shape, info.dtype, info.nbytes) for name, info in stored.tensors.items()}
    method = method_of({key: settings}, "config.json")
    assert method is not None
    _, matrices = collect(method, entries, stored.data, "model.safetensors")
    matrix = matrices["m.weight"]
    weight = make_weight(make("reference"), matrix.format, matrix.shape, matrix.load())
    assert weight.nbytes == matrix.nbytes
    return weight.dequantize()


def random(n: int, k: int, dtype: Any = None) -> Any:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype or torch.float32)


# ---- compressed-tensors -----------------------------------------------------------------------------------------

SCHEMES: dict[str, dict[str, Any]] = {
    "int4-groups": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "int4-asymmetric": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "int3-channel": {"num_bits": 3, "type": "int", "strategy": "channel"},
    "int8-channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int8-naive": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8-block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 48]},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}
FORMATS = {"int4-": "pack-quantized", "int3-": "pack-quantized", "int8-c": "pack-quantized", "int8-n": "int-quantized",
           "fp8-": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = SCHEMES[name]
    format = next(format for start, format in FORMATS.items() if name.startswith(start))
    extra = {"scale_dtype": torch.uint8} if name == "mxfp4" else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args, **extra), format=format)
    weight = random(64, 96)
    blocks = _blocks(weight, args)
    low, high = blocks.amin(-1), blocks.amax(-1)
    state: dict[str, Any] = {"weight": weight}
    options = {}
    if name == "nvfp4":
        state["weight_global_scale"] = (6.0 * 448.0 / weight.abs().max()).reshape(1)
        options = {"global_scale": state["weight_global_scale"]}
    scale, zero = calculate_qparams(low, high, scheme.weights, **options)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    settings = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"weights": args, "targets": ["Linear"]}},
    }
    ours = values(tmp_path, stored, settings)
    theirs = compressor.decompress(dict(stored), scheme)["weight"]
    if theirs.dtype == torch.bfloat16:  # of 4-bit floats it returns products rounded to bfloat16
        ours = torch.from_numpy(ours).to(torch.bfloat16)
    np.testing.assert_array_equal(torch.as_tensor(ours).float().numpy(), theirs.float().numpy())
    assert (theirs.float() - weight).abs().max() < 0.6 * weight.abs().max()


def _blocks(weight: Any, args: dict[str, Any]) -> Any:
    """The weights of each scale along the last axis."""
    n, k = weight.shape
    if args["strategy"] == "tensor":
        return weight.reshape(1, -1)
    if args["strategy"] == "channel":
        return weight.reshape(n, 1, k)
    if args["strategy"] == "block":
        high, wide = args["block_structure"]
        return weight.reshape(n // high, high, k // wide, wide).transpose(1, 2).reshape(n // high, k // wide, -1)
    return weight.reshape(n, -1, args["group_size"])


# ---- bitsandbytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 128), (40, 36), (8, 288)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str, nested: bool, shape: tuple[int, int], tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    packed, state = bnb.functional.quantize_4bit(random(*shape), quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    # As one long row: its CPU kernel (0.50) takes wrong scales where blocks cross rows, its others do not.
    state.shape = torch.Size((1, shape[0] * shape[1]))
    theirs = bnb.functional.dequantize_4bit(packed, state).numpy().reshape(shape)
    np.testing.assert_array_equal(values(tmp_path, tensors, settings), theirs)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    codes, scb, _ = bnb.functional.int8_vectorwise_quant(random(40, 96, torch.float16))
    tensors = {"weight": codes, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}
    theirs = bnb.functional.int8_vectorwise_dequant(codes, scb).numpy()
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    np.testing.assert_array_equal(values(tmp_path, tensors, settings), theirs)


# ---- HQQ and MLX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(bits: int, axis: int, tmp_path: Path) -> None:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    linear = torch.nn.Linear(128, 96, bias=False)
    layer = hqq.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    theirs = layer.dequantize().float().numpy()
    ours = values(tmp_path, dict(layer.state_dict()), {"quant_method": "hqq", "quant_config": {}})
    np.testing.assert_array_equal(ours, theirs)


def _as_torch(array: Any) -> Any:
    import mlx.core as mx

    kind = {mx.uint32: np.uint32, mx.uint8: np.uint8}.get(array.dtype, np.float32)
    host: NDArray[Any] = np.array(array).astype(kind)
    return torch.from_numpy(host)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, group: int, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    stored = mx.quantize(mx.array(random(32, 256).numpy()), group_size=group, bits=bits)
    theirs = np.array(mx.dequantize(*stored, group_size=group, bits=bits))
    tensors = dict(zip(("weight", "scales", "biases"), map(_as_torch, stored), strict=True))
    ours = values(tmp_path, tensors, {"group_size": group, "bits": bits}, "quantization")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_mlx_floats(mode: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    stored = mx.quantize(mx.array(random(32, 256).numpy()), mode=mode)
    theirs = np.array(mx.dequantize(*stored, mode=mode).astype(mx.float32))
    tensors = dict(zip(("weight", "scales"), map(_as_torch, stored), strict=True))
    np.testing.assert_array_equal(
        values(tmp_path, tensors, {"mode": mode, "bits": 4, "group_size": 32}, "quantization"), theirs
    )


# ---- GPTQ, AWQ, FP8 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel(bits: int, act_order: bool, version: int, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    linear = torch.nn.Linear(128, 64, bias=False)
    layer = TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=act_order, in_features=128, out_features=64, register_buffers=True
    )
    groups = torch.arange(128) // 32
    g_idx = groups[torch.randperm(128, generator=torch.Generator().manual_seed(0))] if act_order else groups
    zero = torch.randint(0 if version == 2 else 1, 2**bits, (64, 4))
    # The first version's files hold zero points minus one; the library reads them by adding one to each.
    layer.pack_original(linear, torch.rand(64, 4) * 0.05 + 0.01, zero - int(version == 1), g_idx.to(torch.int32))
    tensors = {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.optimize = lambda *_, **__: None
    layer.post_init()
    layer.scales = layer.scales.float()
    theirs = layer.dequantize_weight().T.numpy()
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    np.testing.assert_array_equal(values(tmp_path, tensors, settings), theirs)


def test_autoawq(tmp_path: Path) -> None:
    packing = pytest.importorskip("awq.utils.packing_utils", reason="autoawq is not installed")
    from awq.modules.linear.gemm import WQLinear_GEMM

    linear = torch.nn.Linear(128, 64, bias=False).half()
    scale, zero = torch.rand(64, 4).half() * 0.01 + 0.001, torch.randint(0, 16, (64, 4)).half()
    layer = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    theirs = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, 32).T.numpy()
    tensors = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
    ours = values(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("block", [(32, 32), (32, 48)])
def test_transformers_fp8(block: tuple[int, int], tmp_path: Path) -> None:
    integration = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="transformers is not installed"
    )
    codes = random(64, 96).to(torch.float8_e4m3fn)
    scale = torch.rand(64 // block[0], 96 // block[1]) + 0.1
    theirs = integration.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32).numpy()
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    np.testing.assert_array_equal(values(tmp_path, {"weight": codes, "weight_scale_inv": scale}, settings), theirs)


def test_transformers_mxfp4(tmp_path: Path) -> None:
    integration = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    blocks = torch.randint(0, 256, (1, 48, 3, 16), dtype=torch.uint8)
    scale = torch.randint(110, 140, (1, 48, 3), dtype=torch.uint8)
    theirs = integration.convert_moe_packed_tensors(blocks, scale, dtype=torch.float32)[0].T.numpy()
    ours = values(tmp_path, {"blocks": blocks[0], "scales": scale[0]}, {"quant_method": "mxfp4"})
    np.testing.assert_array_equal(ours, theirs)
