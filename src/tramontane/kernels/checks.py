"""Checks of the arguments of ops: ranks, sizes that must agree, dtypes, contiguity.

Owns one small language for them. Must not know: how any op is computed, nor on which device (numpy and torch alike).
"""

from __future__ import annotations

from tramontane.kernels.base import BLOCKS, Array

FLOAT32 = ("float32",)
FLOATS = ("float32", "float16", "bfloat16")
INT32 = ("int32",)
UINT8 = ("uint8",)

Spec = tuple[str, Array, str, tuple[str, ...]]


def dtype_name(array: Array) -> str:
    """The numpy name of an array's or a tensor's dtype, such as "bfloat16"."""
    return str(array.dtype).removeprefix("torch.")


def check(op: str, *specs: Spec) -> dict[str, int]:
    """Hold arrays to (name, array, dimensions, dtypes): the same letter means the same size everywhere.

    An array that is None is skipped (an optional argument). Returns the size of each letter; raises ValueError.
    """
    sizes: dict[str, int] = {}
    for name, array, dimensions, dtypes in specs:
        if array is None:
            continue
        shape = tuple(array.shape)
        letters = dimensions.split()
        if len(shape) != len(letters):
            raise ValueError(f"{op}: {name} has shape {list(shape)}, expected [{dimensions}]")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{op}: {name} has shape {list(shape)}, expected [{dimensions}] with {letter} = {sizes[letter]}"
                )
        if dtype_name(array) not in dtypes:
            raise ValueError(f"{op}: {name} is {dtype_name(array)}, expected {' or '.join(dtypes)}")
        if not (array.flags.c_contiguous if hasattr(array, "flags") else array.is_contiguous()):
            raise ValueError(f"{op}: {name} is not contiguous")
    return sizes


def check_blocks(op: str, blocks: Array, format: str, columns: int) -> None:
    """Hold the bytes of a row of blocks to its number of elements."""
    if format not in BLOCKS:
        raise ValueError(f"{op}: format {format!r} is none of {', '.join(BLOCKS)}")
    layout = BLOCKS[format]
    if columns % layout.elements or columns // layout.elements * layout.nbytes != blocks.shape[1]:
        raise ValueError(f"{op}: rows of {columns} elements are not {blocks.shape[1]} bytes of {format}")


def check_attention(
    out: Array,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    query_start: Array,
    context_lens: Array,
) -> None:
    """Hold the arguments of `Ops.attention` to their shapes."""
    sizes = check(
        "attention",
        ("out", out, "T Hq D", FLOAT32),
        ("q", q, "T Hq D", FLOAT32),
        ("k_cache", k_cache, "blocks Hkv size D", FLOATS),
        ("v_cache", v_cache, "blocks Hkv size D", FLOATS),
        ("block_tables", block_tables, "S B", INT32),
        ("context_lens", context_lens, "S", INT32),
        ("query_start", query_start, "S+1", INT32),
    )
    if sizes["S+1"] != sizes["S"] + 1:
        raise ValueError(f"attention: query_start has {sizes['S+1']} entries for {sizes['S']} sequences")
    if sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"attention: {sizes['Hq']} query heads do not share {sizes['Hkv']} key heads")


def check_sample(
    tokens: Array, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, uniform: Array
) -> None:
    """Hold the arguments of `Ops.sample` to their shapes."""
    check(
        "sample",
        ("tokens", tokens, "R", INT32),
        ("logits", logits, "R V", FLOAT32),
        ("temperature", temperature, "R", FLOAT32),
        ("top_k", top_k, "R", INT32),
        ("top_p", top_p, "R", FLOAT32),
        ("min_p", min_p, "R", FLOAT32),
        ("uniform", uniform, "R", FLOAT32),
    )
