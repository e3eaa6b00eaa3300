"""UQFF, mistral.rs's quantized checkpoints: shards of safetensors beside a config.json and what is not quantized.

Owns the container: which files belong together, the version, and the layouts of the formats that a module may be in.
Must not know: how a model is computed. Sources: mistral.rs's UQFF reference page, and files that it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.kernels import BLOCKS, BlockLayout
from tramontane.kernels.coded import TABLES
from tramontane.loading.quantized.afq import plan_affine
from tramontane.loading.quantized.base import FLOATS, Matrix, Method, Module, coded_bytes, flat_grid, flat_values
from tramontane.loading.quantized.eight_bits import plan_eight_bits
from tramontane.loading.quantized.hqq import Groups, plan_groups
from tramontane.loading.quantized.mxfp4 import plan_microscaled
from tramontane.loading.repofiles import RESIDUAL, UQFF_SHARD
from tramontane.loading.safetensors import DTYPES, INDEX_FILE, SINGLE_FILE
from tramontane.loading.tensors import TensorEntry

VERSION = (1, 2)
"""The newest that is read, and every older one of the same major number."""

_VERSION = tuple(f"uqff.version.{part}" for part in ("major", "minor", "patch"))
_GGML = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16",
}  # fmt: skip
_F8Q8_BLOCK = 32
_F8Q8_MAX = np.float32(416.0)
"""What the writer's 8-bit float type calls its largest value; scales are stored as their products with it."""


def is_folder(path: Path) -> bool:
    """Whether a folder's weights are .uqff files."""
    return (
        path.is_dir() and any(path.glob("*.uqff")) and not any((path / n).is_file() for n in (SINGLE_FILE, INDEX_FILE))
    )


def files(path: Path) -> list[Path]:
    """The shards of the model that `path` (a folder, or one of its .uqff files) leads to, and its residual file.

    Raises ModelNotFound, and CorruptCheckpoint where a shard is missing.
    """
    folder = path if path.is_dir() else path.parent
    names = [entry.name for entry in folder.glob("*.uqff")]
    match = UQFF_SHARD.fullmatch(path.name) if path != folder else None
    if path != folder and match is None:
        shards = [path]
    else:
        stem = match["stem"] if match else _only_stem(folder, names)
        numbers = sorted(int(m["number"]) for m in map(UQFF_SHARD.fullmatch, names) if m and m["stem"] == stem)
        if numbers != list(range(len(numbers))) or not numbers:
            raise CorruptCheckpoint(str(folder), f"of {stem}-0.uqff and those that follow, the numbers are {numbers}")
        shards = [folder / f"{stem}-{number}.uqff" for number in numbers]
    residual = folder / RESIDUAL
    return [*shards, residual] if residual.is_file() else shards


def _only_stem(folder: Path, names: list[str]) -> str:
    stems = {m["stem"] for m in map(UQFF_SHARD.fullmatch, names) if m}
    if len(stems) == 1:
        return stems.pop()
    if not stems:
        raise ModelNotFound(str(folder), "the folder has no NAME-0.uqff")
    raise ModelNotFound(
        str(folder), f"the folder holds {len(stems)} UQFF models: {', '.join(sorted(stems)[:10])}", "Pass a .uqff file."
    )


def check_version(tensors: Mapping[str, TensorEntry], read: Callable[[str], NDArray[Any]], source: str) -> None:
    """Raises UnsupportedModel for a version that this build does not read, CorruptCheckpoint for none."""
    parts = []
    for name in _VERSION:
        if name not in tensors or tensors[name].format != "U32" or tensors[name].nbytes != 4:
            raise CorruptCheckpoint(
                source, f"there is no {name}", "Make the UQFF file anew with mistral.rs 0.9 or later."
            )
        parts.append(int(read(name).reshape(-1)[0]))
    if parts[0] != VERSION[0] or parts[1] > VERSION[1]:
        raise UnsupportedModel(
            f"{source} is UQFF {'.'.join(map(str, parts))}; this build reads 1.0 to {'.'.join(map(str, VERSION))}.",
            "Make it anew with a mistral.rs that writes these, or use a GGUF file of the model.",
        )


METHOD = Method(
    label="uqff",
    tensors=tuple(
        f"weight{ending}"
        for ending in (
            *("", ".format", ".dtype", ".shape", ".scales", ".zeros", ".biases", ".bits", ".axis", ".group_size"),
            *(".round_zeros", ".channel_wise", ".optimization_steps", ".num_blocks"),
            *(".dequant_w_scale", ".dequant_x_scale", ".quant_scale"),
        )
    ),
    quantized=lambda module: "weight.format" in module,
    plan=lambda module: _plan(module),
    ignored=_VERSION,
)


def _plan(module: Module) -> Matrix | None:
    number = module.number("weight.format", ("U8",))
    if number not in _FORMATS:
        raise module.unsupported(f"is in format {number} of UQFF")
    return _FORMATS[number](module)


def _shape(module: Module) -> tuple[int, int]:
    return module.sizes("weight.shape", ("U32",))


def _plan_ggml(module: Module) -> Matrix:
    shape = _shape(module)
    number = module.number("weight.dtype", ("U32",))
    format = _GGML.get(number, "")
    (nbytes,) = module.need("weight", ("U8",), (None,))
    if not format:
        raise module.unsupported(f"is in GGML type {number}")
    layout = BLOCKS.get(format, BlockLayout(1, 4 if format == "F32" else 2))
    if shape[1] % layout.elements or shape[0] * (shape[1] // layout.elements) * layout.nbytes != nbytes:
        raise module.corrupt(f"weight takes {nbytes} bytes for {shape[0]} x {shape[1]} in {format}")

    def load() -> dict[str, NDArray[Any]]:
        raw = module.read("weight").reshape(shape[0], -1)
        # The file may have its floats at odd addresses: `require` copies them then.
        return {"blocks": raw} if format in BLOCKS else {"weight": np.require(raw.view(DTYPES[format]), None, ["A"])}

    return Matrix(shape, format, nbytes, load)


def _plan_dense(module: Module) -> None:
    module.need("weight", FLOATS, (None, None))


def _plan_hqq(module: Module) -> Matrix:
    groups = Groups(
        _shape(module),
        module.number("weight.bits", ("U8",)),
        module.number("weight.group_size", ("U32",)),
        module.number("weight.axis", ("U8",)),
    )
    return plan_groups(module, groups, "weight", "weight.scales", "weight.zeros")


def _plan_fp8(module: Module) -> Matrix:
    module.need("weight.dequant_w_scale", ("F32",), (), (1,))
    return plan_eight_bits(module, "weight.dequant_w_scale")


def _plan_afq(module: Module) -> Matrix:
    bits, group = module.number("weight.bits", ("U8",)), module.number("weight.group_size", ("U8",))
    return plan_affine(module, bits, group, "weight", "weight.scales", "weight.biases")


def _plan_f8q8(module: Module) -> Matrix:
    """Blocks of 32 over the whole matrix: an 8-bit float, the scale times its type's largest value; 32 int8."""
    shape = _shape(module)
    count = shape[0] * shape[1]
    blocks = -(-count // _F8Q8_BLOCK)
    module.need("weight", ("U8",), (blocks * (_F8Q8_BLOCK + 1),))
    grid = flat_grid(shape, _F8Q8_BLOCK)

    def load() -> dict[str, NDArray[Any]]:
        raw = module.read("weight").reshape(blocks, _F8Q8_BLOCK + 1)
        return {
            "codes": raw[:, 1:].reshape(-1)[:count].reshape(shape),
            "table": TABLES["S8"],
            "scales": flat_values(raw[:, 0], grid, _F8Q8_BLOCK),
            "scale_table": TABLES["E4M3"] / _F8Q8_MAX,
            "layout": grid.layout,
        }

    size = coded_bytes(count, 8, grid.lines * grid.groups, scale_table=True)
    return Matrix(shape, "INT8", size, load)


def _plan_mxfp4(module: Module) -> Matrix:
    return plan_microscaled(module, "weight", "weight.scales")


_FORMATS: Mapping[int, Callable[[Module], Matrix | None]] = {
    0: _plan_ggml,
    1: _plan_dense,
    2: _plan_hqq,
    3: _plan_fp8,
    4: _plan_afq,
    5: _plan_f8q8,
    6: _plan_mxfp4,
}
