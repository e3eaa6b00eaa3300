"""Writers of quantized modules, one a method, straight from the formats' published descriptions.

Each returns a module's tensors by their names below it, and the values that they stand for: float32 [N, K], computed
element by element from the same numbers that were packed. Nothing here uses the package under test.

Descriptions: AutoGPTQ and GPTQModel (qlinear `pack`), AutoAWQ (`WQLinear_GEMM.from_linear`), compressed-tensors
(`pack_to_int32`, `NVFP4PackedCompressor`), DeepSeek-V3's `weight_scale_inv`, bitsandbytes (`quantize_4bit`,
`int8_vectorwise_quant`), hqq (`BitPack`, `Quantizer`), MLX (`mx.quantize`), OCP Microscaling 1.0 and FP8 1.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
Written = tuple[Tensors, NDArray[np.float32]]
Rng = np.random.Generator

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
]  # fmt: skip


def scales(rng: Rng, *shape: int, dtype: Any = np.float16) -> NDArray[Any]:
    return rng.uniform(0.002, 0.1, shape).astype(dtype)


def stream(codes: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """Each row of codes as one stream of bits, lowest first, cut into words of 32."""
    rows = []
    for row in codes.tolist():
        total = sum(code << (i * bits) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([total >> (32 * w) & 0xFFFFFFFF for w in range(words)])
    return np.array(rows, np.uint32)


def spread(grid: NDArray[Any], group: int, columns: int) -> NDArray[np.float32]:
    """[N, G] to [N, K]: column k takes group k // group."""
    return np.stack([grid[:, k // group] for k in range(columns)], axis=1).astype(np.float32)


# ---- GPTQ and AWQ -----------------------------------------------------------------------------------------------


def gptq(rng: Rng, n: int, k: int, *, bits: int, group: int, version: int = 1, act_order: bool = False) -> Written:
    groups = -(-k // group)
    codes = rng.integers(0, 2**bits, (n, k))
    low = 1 if version == 1 else 0  # the first version stores zero points minus one
    zeros = rng.integers(low, 2**bits, (n, groups))
    scale = scales(rng, n, groups)
    g_idx = np.arange(k) // group
    if act_order:
        g_idx = g_idx[rng.permutation(k)]
    values = (codes - zeros[:, g_idx]).astype(np.float32) * scale.astype(np.float32)[:, g_idx]
    stored = zeros - (1 if version == 1 else 0)
    tensors = {
        "qweight": np.ascontiguousarray(stream(codes, bits).T).view(np.int32),
        "qzeros": stream(stored.T, bits).view(np.int32),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, values


def awq(rng: Rng, n: int, k: int, *, group: int) -> Written:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(outputs: NDArray[Any]) -> NDArray[np.int32]:
        """[R, N] to [R, N / 8]."""
        packed = np.zeros((len(outputs), n // 8), np.uint32)
        for word in range(n // 8):
            for i, output in enumerate(order):
                packed[:, word] |= outputs[:, 8 * word + output].astype(np.uint32) << np.uint32(4 * i)
        return packed.view(np.int32)

    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // group))
    scale = scales(rng, n, k // group)
    values = (codes - np.repeat(zeros, group, 1)).astype(np.float32) * spread(scale, group, k)
    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": np.ascontiguousarray(scale.T)}, values


# ---- compressed-tensors -----------------------------------------------------------------------------------------


def packed_ints(
    rng: Rng, n: int, k: int, *, bits: int, group: int = 0, zero: bool = False, dense: bool = True, order: bool = False
) -> Written:
    groups = k // group if group else 1
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (n, k))
    scale = scales(rng, n, groups, dtype=ml_dtypes.bfloat16)
    zeros = rng.integers(-half, half, (n, groups)) if zero else np.zeros((n, groups), int)
    g_idx = np.arange(k) // (group or k)
    if order:
        g_idx = g_idx[rng.permutation(k)]

    def pack(rows: NDArray[Any]) -> NDArray[np.int32]:
        if dense:
            return stream(rows + half, bits).view(np.int32)
        each = 32 // bits
        padded = np.zeros((len(rows), -(-rows.shape[1] // each) * each), np.int64)
        padded[:, : rows.shape[1]] = rows + half
        words = sum(padded[:, i::each] << (i * bits) for i in range(each))
        return np.asarray(words, np.uint32).view(np.int32)

    tensors = {"weight_packed": pack(codes), "weight_scale": scale, "weight_shape": np.array([n, k], np.int64)}
    if zero:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(zeros.T).T)
    if order:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    values = (codes - zeros[:, g_idx]).astype(np.float32) * scale.astype(np.float32)[:, g_idx]
    return tensors, values


def int8(rng: Rng, n: int, k: int, *, zero: bool = False) -> Written:
    codes = rng.integers(-128, 128, (n, k), dtype=np.int8)
    scale = scales(rng, n, 1, dtype=np.float32)
    tensors = {"weight": codes, "weight_scale": scale, "input_scale": np.ones(1, np.float32)}
    values = codes.astype(np.float32)
    if zero:
        tensors["weight_zero_point"] = rng.integers(-9, 9, (n, 1), dtype=np.int8)
        values = values - tensors["weight_zero_point"].astype(np.float32)
    return tensors, values * scale


def fp8_codes(rng: Rng, n: int, k: int) -> NDArray[Any]:
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    codes[(codes & 127) == 127] = 0  # not a number
    return codes.view(ml_dtypes.float8_e4m3fn)


def fp8(rng: Rng, n: int, k: int, *, kind: str, name: str = "weight_scale", block: int = 0) -> Written:
    """`kind`: tensor, channel, block, group."""
    codes = fp8_codes(rng, n, k)
    values = codes.astype(np.float32)
    if kind == "tensor":
        scale: NDArray[Any] = scales(rng, 1, dtype=np.float32)
        return {"weight": codes, name: scale}, values * scale
    if kind == "channel":
        scale = scales(rng, n, 1, dtype=ml_dtypes.bfloat16)
        return {"weight": codes, name: scale}, values * scale.astype(np.float32)
    rows = block if kind == "block" else 1
    scale = scales(rng, -(-n // rows), -(-k // block), dtype=np.float32)
    for i in range(n):
        for j in range(k):
            values[i, j] *= scale[i // rows, j // block]
    return {"weight": codes, name: scale}, values


def nibbles(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Two codes a byte, the first in the lower half."""
    packed: NDArray[np.uint8] = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return packed


def nvfp4(rng: Rng, n: int, k: int) -> Written:
    codes = rng.integers(0, 16, (n, k))
    scale = rng.uniform(1, 400, (n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
    divisor = rng.uniform(500, 3000, 1).astype(np.float32)
    effective = scale.astype(np.float32) / divisor
    values = np.array(E2M1, np.float32)[codes] * spread(effective, 16, k)
    return {"weight_packed": nibbles(codes), "weight_scale": scale, "weight_global_scale": divisor}, values


def e8m0(rng: Rng, *shape: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    stored = rng.integers(100, 140, shape, dtype=np.uint8)
    return stored, np.exp2(stored.astype(np.float64) - 127).astype(np.float32)


def mxfp4(rng: Rng, n: int, k: int, *, codes_name: str = "weight_packed", scale_name: str = "weight_scale") -> Written:
    codes = rng.integers(0, 16, (n, k))
    stored, scale = e8m0(rng, n, k // 32)
    values = np.array(E2M1, np.float32)[codes] * spread(scale, 32, k)
    return {codes_name: nibbles(codes), scale_name: stored}, values


def gpt_oss(rng: Rng, n: int, k: int) -> Written:
    tensors, values = mxfp4(rng, n, k, codes_name="blocks", scale_name="scales")
    return {**tensors, "blocks": tensors["blocks"].reshape(n, k // 32, 16)}, values


# ---- bitsandbytes -----------------------------------------------------------------------------------------------


def bnb_int8(rng: Rng, n: int, k: int) -> Written:
    codes, scb = rng.integers(-127, 128, (n, k), dtype=np.int8), rng.uniform(0.1, 3, n).astype(np.float32)
    values = codes.astype(np.float32) * scb[:, None] * np.float32(7.874015718698502e-3)
    return {"weight": codes, "SCB": scb, "weight_format": np.zeros((), np.uint8)}, values


def bnb_4bit(rng: Rng, n: int, k: int, *, kind: str, block: int = 64, nested: bool = False) -> Written:
    codes = rng.integers(0, 16, n * k)
    padded = np.resize(codes, len(codes) + len(codes) % 2)
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)
    runs = -(-n * k // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [n, k]}
    tensors: Tensors = {
        "weight": (padded[0::2] << 4 | padded[1::2]).astype(np.uint8).reshape(-1, 1),
        "weight.quant_map": table,
    }
    if nested:
        wide, offset = 256, 0.046875
        table8 = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        tensors["weight.absmax"] = rng.integers(0, 256, runs, dtype=np.uint8)
        tensors["weight.nested_absmax"] = rng.uniform(0.01, 0.1, -(-runs // wide)).astype(np.float32)
        tensors["weight.nested_quant_map"] = table8
        state |= {"nested_blocksize": wide, "nested_dtype": "float32", "nested_offset": offset}
        each = tensors["weight.nested_absmax"][np.arange(runs) // wide]
        absmax = table8[tensors["weight.absmax"]] * each + np.float32(offset)
    else:
        absmax = tensors["weight.absmax"] = rng.uniform(0.01, 0.2, runs).astype(np.float32)
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    values = table[codes] * absmax[np.arange(n * k) // block]
    return tensors, values.astype(np.float32).reshape(n, k)


# ---- HQQ and MLX ------------------------------------------------------------------------------------------------


def hqq_words(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    """[R, C] codes to words: rows R / each apart share a word, the first in the uppermost bits."""
    if bits == 8:
        return codes.astype(np.uint8)
    each, dtype = {4: (2, np.uint8), 2: (4, np.uint8), 1: (8, np.uint8), 3: (10, np.int32)}[bits]
    step = -(-len(codes) // each)
    padded = np.zeros((step * each, codes.shape[1]), np.int64)
    padded[: len(codes)] = codes
    words = np.zeros((step, codes.shape[1]), np.int64)
    for i in range(each):
        words |= padded[i * step : (i + 1) * step] << (bits * (each - 1 - i))
    return words.astype(dtype)


def hqq(rng: Rng, n: int, k: int, *, bits: int, group: int, axis: int, dtype: Any = np.float16) -> Written:
    shape = (n * k // group, group) if axis else (group, n * k // group)
    codes = rng.integers(0, 2**bits, shape)
    grid = (shape[0], 1) if axis else (1, shape[1])
    scale, zero = scales(rng, *grid, dtype=dtype), rng.uniform(0, 2**bits, grid).astype(dtype)
    values = (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[bits]
    tensors = {
        "W_q": hqq_words(codes, bits),
        "scale": scale,
        "zero": zero,
        "nbits": np.array(bits, np.int32),
        "group_size": np.array(group, np.int32),
        "axis": np.array(axis, np.int32),
        "shape": np.array([n, k], np.int64),
        "packing": np.frombuffer(packing.encode(), np.uint8),
        "compute_dtype": np.frombuffer(b"torch.float16", np.uint8),
        "unpack_view_dtype": np.frombuffer(b"torch.uint8", np.uint8),
        **{name: np.array(0, np.uint8) for name in ("view_as_float", "quant_zero", "quant_scale", "offload_meta")},
        **{name: np.array(1, np.uint8) for name in ("channel_wise", "optimize", "round_zero")},
        **{name: np.array(1, np.uint8) for name in ("encoded_state_dict", "stores_quant_config")},
    }
    return tensors, values.reshape(n, k)


def mlx(rng: Rng, n: int, k: int, *, bits: int, group: int, dtype: Any = np.float16) -> Written:
    codes = rng.integers(0, 2**bits, (n, k))
    scale, bias = scales(rng, n, k // group, dtype=dtype), rng.uniform(-1, 0, (n, k // group)).astype(dtype)
    values = codes.astype(np.float32) * spread(scale, group, k) + spread(bias, group, k)
    return {"weight": stream(codes, bits), "scales": scale, "biases": bias}, values


def mlx_floats(rng: Rng, n: int, k: int, *, mode: str) -> Written:
    if mode == "mxfp8":
        codes, (stored, scale) = fp8_codes(rng, n, k), e8m0(rng, n, k // 32)
        return {"weight": codes.view(np.uint32), "scales": stored}, codes.astype(np.float32) * spread(scale, 32, k)
    if mode == "mxfp4":
        tensors, values = mxfp4(rng, n, k, codes_name="weight", scale_name="scales")
        return {**tensors, "weight": tensors["weight"].view(np.uint32)}, values
    codes = rng.integers(0, 16, (n, k))
    scale8 = rng.uniform(0.01, 2, (n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
    values = np.array(E2M1, np.float32)[codes] * spread(scale8, 16, k)
    return {"weight": stream(codes, 4), "scales": scale8.view(np.uint8)}, values


Writer = Callable[[Rng, int, int], Written]
