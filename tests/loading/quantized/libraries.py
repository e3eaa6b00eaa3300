"""Modules packed by the libraries that define the formats, and what each says that its own stand for in float32.

`python -m tests.loading.quantized.libraries` writes the small ones of `GOLDEN` to `golden/`, each with its library's
name and version, so that they are read where no library is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "golden"
Shape = tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """One module: its tensors (of torch) by their names below it, the settings of its checkpoint, and its values."""

    library: str
    tensors: Mapping[str, Any]
    settings: Mapping[str, Any]
    values: NDArray[np.float32]
    key: str = "quantization_config"
    rounded: bool = False
    """Whether the library gives its products rounded to bfloat16."""


def random(shape: Shape, dtype: Any = None) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype or torch.float32)


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


def compressed_tensors(name: str, shape: Shape = (64, 96)) -> Packed:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = SCHEMES[name]
    format = next(format for start, format in FORMATS.items() if name.startswith(start))
    extra = {"scale_dtype": torch.uint8} if name == "mxfp4" else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args, **extra), format=format)
    weight = random(shape)
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
    values = compressor.decompress(dict(stored), scheme)["weight"]
    assert (values.float() - weight).abs().max() < 0.6 * weight.abs().max()
    settings = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"weights": args, "targets": ["Linear"]}},
    }
    rounded = values.dtype == torch.bfloat16
    return Packed("compressed-tensors", stored, settings, values.float().numpy(), rounded=rounded)


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


def bitsandbytes_4bit(kind: str, nested: bool, shape: Shape) -> Packed:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import torch

    packed, state = bnb.functional.quantize_4bit(random(shape), quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    # As one long row: its CPU kernel (0.50) takes wrong scales where blocks cross rows, its others do not.
    state.shape = torch.Size((1, shape[0] * shape[1]))
    values = bnb.functional.dequantize_4bit(packed, state).numpy().reshape(shape)
    return Packed("bitsandbytes", tensors, settings, values)


def bitsandbytes_int8(shape: Shape = (40, 96)) -> Packed:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import torch

    codes, scb, _ = bnb.functional.int8_vectorwise_quant(random(shape, torch.float16))
    tensors = {"weight": codes, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}
    values = bnb.functional.int8_vectorwise_dequant(codes, scb).numpy()
    return Packed("bitsandbytes", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, values)


# ---- HQQ and MLX ------------------------------------------------------------------------------------------------


def hqq(bits: int, axis: int, shape: Shape = (96, 128)) -> Packed:
    library = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    import torch

    torch.manual_seed(bits)
    config = library.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer = library.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    values = layer.dequantize().float().numpy()
    return Packed("hqq", dict(layer.state_dict()), {"quant_method": "hqq", "quant_config": {}}, values)


def mlx(bits: int, group: int, shape: Shape = (32, 256)) -> Packed:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    stored = mx.quantize(mx.array(random(shape).numpy()), group_size=group, bits=bits)
    values = np.array(mx.dequantize(*stored, group_size=group, bits=bits))
    tensors = dict(zip(("weight", "scales", "biases"), map(_as_torch, stored), strict=True))
    return Packed("mlx", tensors, {"group_size": group, "bits": bits}, values, "quantization")


def mlx_floats(mode: str, shape: Shape = (32, 256)) -> Packed:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    stored = mx.quantize(mx.array(random(shape).numpy()), mode=mode)
    values = np.array(mx.dequantize(*stored, mode=mode).astype(mx.float32))
    tensors = dict(zip(("weight", "scales"), map(_as_torch, stored), strict=True))
    return Packed("mlx", tensors, {"mode": mode, "bits": 4, "group_size": 32}, values, "quantization")


def _as_torch(array: Any) -> Any:
    import mlx.core as mx
    import torch

    kind = {mx.uint32: np.uint32, mx.uint8: np.uint8}.get(array.dtype, np.float32)
    host: NDArray[Any] = np.array(array).astype(kind)
    return torch.from_numpy(host)


# ---- GPTQ, AWQ, and what transformers reads itself --------------------------------------------------------------


def gptqmodel(bits: int, act_order: bool, version: int, shape: Shape = (64, 128)) -> Packed:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    torch.manual_seed(bits)
    n, k = shape
    linear = torch.nn.Linear(k, n, bias=False)
    layer = TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=act_order, in_features=k, out_features=n, register_buffers=True
    )
    groups = torch.arange(k) // 32
    g_idx = groups[torch.randperm(k, generator=torch.Generator().manual_seed(0))] if act_order else groups
    zero = torch.randint(0 if version == 2 else 1, 2**bits, (n, k // 32))
    # The first version's files hold zero points minus one; the library reads them by adding one to each.
    layer.pack_original(linear, torch.rand(n, k // 32) * 0.05 + 0.01, zero - int(version == 1), g_idx.to(torch.int32))
    tensors = {name: getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.optimize = lambda *_, **__: None
    layer.post_init()
    layer.scales = layer.scales.float()
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return Packed("gptqmodel", tensors, settings, layer.dequantize_weight().T.numpy())


def autoawq(shape: Shape = (64, 128)) -> Packed:
    packing = pytest.importorskip("awq.utils.packing_utils", reason="autoawq is not installed")
    import torch
    from awq.modules.linear.gemm import WQLinear_GEMM

    torch.manual_seed(4)
    n, k = shape
    linear = torch.nn.Linear(k, n, bias=False).half()
    scale, zero = torch.rand(n, k // 32).half() * 0.01 + 0.001, torch.randint(0, 16, (n, k // 32)).half()
    layer = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    values = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, 32).T.numpy()
    tensors = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
    return Packed("autoawq", tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, values)


def transformers_fp8(block: tuple[int, int]) -> Packed:
    integration = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="transformers is not installed"
    )
    import torch

    codes = random((64, 96)).to(torch.float8_e4m3fn)
    scale = torch.rand(64 // block[0], 96 // block[1]) + 0.1
    values = integration.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32).numpy()
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    return Packed("transformers", {"weight": codes, "weight_scale_inv": scale}, settings, values)


def transformers_mxfp4() -> Packed:
    integration = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    import torch

    blocks = torch.randint(0, 256, (1, 48, 3, 16), dtype=torch.uint8)
    scale = torch.randint(110, 140, (1, 48, 3), dtype=torch.uint8)
    values = integration.convert_moe_packed_tensors(blocks, scale, dtype=torch.float32)[0].T.numpy()
    return Packed("transformers", {"blocks": blocks[0], "scales": scale[0]}, {"quant_method": "mxfp4"}, values)


CASES: dict[str, Callable[[], Packed]] = {
    **{f"compressed-tensors {name}": partial(compressed_tensors, name) for name in SCHEMES},
    **{
        f"bitsandbytes {kind}{', nested' if nested else ''}, {shape}": partial(bitsandbytes_4bit, kind, nested, shape)
        for kind in ("nf4", "fp4")
        for nested in (False, True)
        for shape in ((48, 128), (40, 36), (8, 288))
    },
    "bitsandbytes int8": bitsandbytes_int8,
    **{f"hqq {bits}, axis {axis}": partial(hqq, bits, axis) for bits in (1, 2, 3, 4, 8) for axis in (0, 1)},
    **{f"mlx {b}, group {g}": partial(mlx, b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)},
    **{f"mlx {mode}": partial(mlx_floats, mode) for mode in ("mxfp4", "nvfp4", "mxfp8")},
    **{
        f"gptqmodel {bits}, v{version}{', act-order' if order else ''}": partial(gptqmodel, bits, order, version)
        for bits in (2, 3, 4, 8)
        for order in (False, True)
        for version in (1, 2)
    },
    "autoawq": autoawq,
    "transformers fp8": partial(transformers_fp8, (32, 32)),
    "transformers fp8, wide": partial(transformers_fp8, (32, 48)),
    "transformers mxfp4": transformers_mxfp4,
}

_SMALL = (16, 64)
GOLDEN: dict[str, Callable[[], Packed]] = {
    **{
        f"compressed-tensors-{name}": partial(compressed_tensors, name, _SMALL)
        for name in ("int4-groups", "int4-asymmetric", "int8-naive", "fp8-channel", "nvfp4", "mxfp4")
    },
    "bitsandbytes-nf4-nested": partial(bitsandbytes_4bit, "nf4", True, _SMALL),
    "bitsandbytes-fp4": partial(bitsandbytes_4bit, "fp4", False, _SMALL),
    "bitsandbytes-int8": partial(bitsandbytes_int8, _SMALL),
    "hqq-4-axis1": partial(hqq, 4, 1, _SMALL),
    "hqq-3-axis0": partial(hqq, 3, 0, (64, 32)),
    "mlx-4": partial(mlx, 4, 32, _SMALL),
    "mlx-3": partial(mlx, 3, 32, _SMALL),
    "mlx-mxfp4": partial(mlx_floats, "mxfp4", _SMALL),
    "mlx-mxfp8": partial(mlx_floats, "mxfp8", _SMALL),
    "gptqmodel-4": partial(gptqmodel, 4, False, 1, (32, 64)),
    "gptqmodel-3-act-order-v2": partial(gptqmodel, 3, True, 2, (32, 64)),
    "autoawq": partial(autoawq, (32, 64)),
}
_VALUES = "values"


def record(folder: Path = FOLDER) -> None:
    """Write the golden files. Every library must be installed."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    for name, write in GOLDEN.items():
        packed = write()
        tensors = {f"m.{key}": tensor.contiguous().clone() for key, tensor in packed.tensors.items()}
        tensors[_VALUES] = torch.from_numpy(np.ascontiguousarray(packed.values))
        notes = {"library": f"{packed.library} {version(packed.library)}", "key": packed.key}
        notes |= {"settings": json.dumps(packed.settings), "rounded": json.dumps(packed.rounded)}
        save_file(tensors, folder / f"{name}.safetensors", metadata=notes)


def golden(name: str) -> Packed:
    """What a golden file holds."""
    from safetensors import safe_open

    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key.removeprefix("m."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        notes = file.metadata()
    values, settings = tensors.pop(_VALUES).numpy(), json.loads(notes["settings"])
    return Packed(notes["library"], tensors, settings, values, notes["key"], json.loads(notes["rounded"]))


if __name__ == "__main__":
    record()
