"""Quantized checkpoints of a small llama, written by `writers`, and the plain values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.loading.checkpoints import CONFIG, hf_tensors
from tests.loading.quantized import writers as w

LLAMA = {**CONFIG, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}


@dataclass(frozen=True)
class Case:
    """One way to quantize: a writer of modules, the settings in config.json, and the format it is kept in."""

    write: w.Writer
    settings: Mapping[str, Any]
    format: str
    key: str = "quantization_config"
    every: bool = False
    """Whether the embedding and the head are quantized too."""


def _gptq(bits: int, **settings: Any) -> Case:
    version = 2 if settings.get("checkpoint_format") == "gptq_v2" else 1
    write = partial(w.gptq, bits=bits, group=32, version=version, act_order=settings.get("desc_act", False))
    return Case(write, {"quant_method": "gptq", "bits": bits, "group_size": 32, **settings}, f"INT{bits}")


def _ct(write: w.Writer, format: str, stored: str, **weights: Any) -> Case:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return Case(write, {**settings, "ignore": ["lm_head"], "kv_cache_scheme": None}, stored)


def _packed(bits: int, group: int = 32, **options: Any) -> Case:
    write = partial(w.packed_ints, bits=bits, group=group, **options)
    return _ct(write, "pack-quantized", f"INT{bits}", num_bits=bits, type="int", group_size=group or None)


def _fp8(kind: str, name: str, block: int = 0) -> Case:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if block:
        settings["weight_block_size"] = [block, block]  # type: ignore[assignment]
    return Case(partial(w.fp8, kind=kind, name=name, block=block), settings, "FP8")


def _bnb(kind: str, **options: Any) -> Case:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Case(partial(w.bnb_4bit, kind=kind, **options), settings, kind.upper())


def _hqq(bits: int, axis: int, **options: Any) -> Case:
    write = partial(w.hqq, bits=bits, group=options.pop("group", 32), axis=axis, **options)
    return Case(write, {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}, f"INT{bits}")


def _mlx(bits: int, dtype: Any = np.float16) -> Case:
    write = partial(w.mlx, bits=bits, group=32, dtype=dtype)
    return Case(write, {"bits": bits, "group_size": 32}, f"INT{bits}", "quantization", every=True)


def _mlx_floats(mode: str, format: str) -> Case:
    settings = {"mode": mode, "bits": 4, "group_size": 32}
    return Case(partial(w.mlx_floats, mode=mode), settings, format, "quantization", every=True)


CASES: dict[str, Case] = {
    **{f"gptq-{bits}": _gptq(bits) for bits in (2, 3, 4, 8)},
    **{f"gptq-{bits}-v2": _gptq(bits, checkpoint_format="gptq_v2") for bits in (2, 3, 4, 8)},
    **{f"gptq-{bits}-act-order": _gptq(bits, desc_act=True) for bits in (3, 4)},
    "awq": Case(
        partial(w.awq, group=32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "INT4"
    ),
    **{f"packed-{bits}": _packed(bits) for bits in range(1, 9)},
    **{f"packed-{bits}-loose": _packed(bits, dense=False) for bits in (3, 5, 6, 7)},
    "packed-4-zeros": _packed(4, zero=True),
    "packed-8-zeros": _packed(8, zero=True),
    "packed-4-channel": _packed(4, group=0),
    "packed-4-act-order": _packed(4, order=True),
    "int8": _ct(w.int8, "int-quantized", "INT8", num_bits=8, type="int", strategy="channel"),
    "int8-zeros": _ct(partial(w.int8, zero=True), "int-quantized", "INT8", num_bits=8, type="int"),
    "float8-tensor": _ct(partial(w.fp8, kind="tensor"), "float-quantized", "FP8", num_bits=8, type="float"),
    "float8-channel": _ct(partial(w.fp8, kind="channel"), "float-quantized", "FP8", num_bits=8, type="float"),
    "float8-block": _ct(
        partial(w.fp8, kind="block", block=48), "float-quantized", "FP8", num_bits=8, block_structure=[48, 48]
    ),
    "float8-group": _ct(partial(w.fp8, kind="group", block=32), "float-quantized", "FP8", num_bits=8, group_size=32),
    "nvfp4": _ct(w.nvfp4, "nvfp4-pack-quantized", "FP4", num_bits=4, type="float", group_size=16),
    "mxfp4": _ct(w.mxfp4, "mxfp4-pack-quantized", "FP4", num_bits=4, type="float", group_size=32),
    "fp8-blocks": _fp8("block", "weight_scale_inv", 32),
    "fp8-ragged-blocks": _fp8("block", "weight_scale_inv", 48),
    "fp8-tensor": _fp8("tensor", "weight_scale"),
    "fp8-channel": _fp8("channel", "weight_scale"),
    "bnb-int8": Case(w.bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "INT8"),
    **{f"bnb-{kind}": _bnb(kind) for kind in ("nf4", "fp4")},
    **{f"bnb-{kind}-nested": _bnb(kind, nested=True) for kind in ("nf4", "fp4")},
    "bnb-nf4-across-rows": _bnb("nf4", block=256),
    **{f"hqq-{bits}-axis{axis}": _hqq(bits, axis) for bits in (1, 2, 3, 4, 8) for axis in (0, 1)},
    "hqq-4-bfloat16": _hqq(4, 1, dtype=ml_dtypes.bfloat16),
    "hqq-4-across-rows": _hqq(4, 1, group=256),
    **{f"mlx-{bits}": _mlx(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx-4-bfloat16": _mlx(4, ml_dtypes.bfloat16),
    **{
        f"mlx-{mode}": _mlx_floats(mode, format)
        for mode, format in (("mxfp4", "FP4"), ("nvfp4", "FP4"), ("mxfp8", "FP8"))
    },
    "gpt-oss": Case(w.gpt_oss, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "FP4"),
}


def tensors_of(case: Case) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The tensors of a checkpoint of this case, and the plain values of all its parameters, matrices in float32."""
    rng = np.random.default_rng(11)
    plain, stored = hf_tensors(LLAMA), dict[str, NDArray[Any]]()
    for name, values in plain.items():
        plain[name] = values / np.float32(8)
        if values.ndim < 2 or not (case.every or ".layers." in name):
            stored[name] = plain[name]
            continue
        tensors, plain[name] = case.write(rng, *values.shape)
        module = name.removesuffix(".weight")
        stored.update({f"{module}.{ending}": np.array(array, order="C") for ending, array in tensors.items()})
    return stored, plain


def write_case(folder: Path, case: Case, **changes: Any) -> dict[str, NDArray[Any]]:
    """Write a checkpoint of this case to a new folder; the plain values of all its parameters.

    `changes` are tensors that replace those of their names, or None to leave one out.
    """
    from safetensors.numpy import save_file

    stored, plain = tensors_of(case)
    for name, change in changes.items():
        stored.pop(name, None)
        if change is not None:
            stored[name] = change
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**LLAMA, case.key: dict(case.settings)}))
    return plain
