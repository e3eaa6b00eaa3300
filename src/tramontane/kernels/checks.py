"""Checks of the arguments of ops: ranks, sizes that must agree, dtypes, contiguity.

Owns one small language for them. Must not know: how any op is computed, nor on which device (numpy and torch alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tramontane.kernels.base import BLOCKS, Array
from tramontane.kernels.cells import cells_of

FLOAT32 = ("float32",)
FLOATS = ("float32", "float16", "bfloat16")
CACHES = (*FLOATS, "int8", "float8_e4m3fn")
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


def check_same(op: str, **arrays: Array) -> None:
    """Hold arrays to float32 of one shape, of any rank."""
    (first, one), *_ = arrays.items()
    for name, array in arrays.items():
        if array.shape != one.shape:
            raise ValueError(f"{op}: {first} has shape {list(one.shape)}, {name} {list(array.shape)}")
        dimensions = " ".join(f"d{axis}" for axis in range(len(array.shape)))
        check(op, (name, array, dimensions, FLOAT32))


def check_blocks(op: str, blocks: Array, format: str, columns: int) -> None:
    """Hold the bytes of a row of blocks to its number of elements."""
    if format not in BLOCKS:
        raise ValueError(f"{op}: format {format!r} is none of {', '.join(BLOCKS)}")
    layout = BLOCKS[format]
    if columns % layout.elements or columns // layout.elements * layout.nbytes != blocks.shape[1]:
        raise ValueError(f"{op}: rows of {columns} elements are not {blocks.shape[1]} bytes of {format}")


def check_caches(op: str, k_cache: Array, v_cache: Array, key_size: int, value_size: int) -> None:
    """Hold caches to heads of these sizes, and to each other."""
    sizes = check(
        op, ("k_cache", k_cache, "blocks H stored size", CACHES), ("v_cache", v_cache, "blocks H size stored_v", CACHES)
    )
    if dtype_name(k_cache) != dtype_name(v_cache):
        raise ValueError(f"{op}: k_cache is {dtype_name(k_cache)}, v_cache {dtype_name(v_cache)}")
    cells = cells_of(k_cache)
    for name, stored, width in (("k_cache", "stored", key_size), ("v_cache", "stored_v", value_size)):
        if sizes[stored] != cells.width(width):
            raise ValueError(f"{op}: {name} keeps {sizes[stored]} of a token, expected {cells.width(width)}")


def check_write(k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
    """Hold the arguments of `Ops.write_cache` to their shapes."""
    sizes = check("write_cache", ("k", k, "T H D", FLOAT32), ("v", v, "T H Dv", FLOAT32), ("slots", slots, "T", INT32))
    check_caches("write_cache", k_cache, v_cache, sizes["D"], sizes["Dv"])
    if k_cache.shape[1] != sizes["H"]:
        raise ValueError(f"write_cache: k_cache is of {k_cache.shape[1]} heads, k of {sizes['H']}")


def check_read(k: Array, v: Array, k_cache: Array, v_cache: Array, table: Array, first: int) -> None:
    """Hold the arguments of `Ops.read_cache` to their shapes."""
    sizes = check("read_cache", ("k", k, "T H D", FLOAT32), ("v", v, "T H Dv", FLOAT32), ("table", table, "B", INT32))
    check_caches("read_cache", k_cache, v_cache, sizes["D"], sizes["Dv"])
    if k_cache.shape[1] != sizes["H"]:
        raise ValueError(f"read_cache: k_cache is of {k_cache.shape[1]} heads, k of {sizes['H']}")
    if first < 0 or first + sizes["T"] > sizes["B"] * k_cache.shape[3]:
        raise ValueError(f"read_cache: {sizes['T']} tokens from {first} are not in {sizes['B']} blocks")


def check_attention(
    out: Array,
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    query_start: Array,
    context_lens: Array,
    causal: bool = True,
    sinks: Array | None = None,
    slopes: Array | None = None,
    latent: bool = False,
    totals: Array | None = None,
    joins: bool = False,
) -> None:
    """Hold the arguments of `Ops.attention` to their shapes."""
    sizes = check(
        "attention",
        ("out", out, "T Hq Dv", FLOAT32),
        ("q", q, "T Hq D", FLOAT32),
        ("sinks", sinks, "Hq", FLOAT32),
        ("slopes", slopes, "Hq", FLOAT32),
        ("block_tables", block_tables, "S B", INT32),
        ("context_lens", context_lens, "S", INT32),
        ("query_start", query_start, "S+1", INT32),
        ("totals", totals, "T Hq", FLOAT32),
    )
    stored = (sizes["Dv"], sizes["D"] - sizes["Dv"]) if latent else (sizes["D"], sizes["Dv"])
    check_caches("attention", k_cache, v_cache, *stored)
    if sizes["S+1"] != sizes["S"] + 1:
        raise ValueError(f"attention: query_start has {sizes['S+1']} entries for {sizes['S']} sequences")
    heads = int(k_cache.shape[1])
    if sizes["Hq"] % heads:
        raise ValueError(f"attention: {sizes['Hq']} query heads do not share {heads} key heads")
    if slopes is not None and not causal:
        raise ValueError("attention: slopes go with causal attention")
    if joins and (totals is None or sinks is not None):
        raise ValueError("attention: what is joined has totals, and its sinks already")


def check_norm(op: str, out: Array, x: Array, *weights: Array | None) -> None:
    """Hold the arguments of a norm to their shapes: weights [K], or [W,K] where W divides the rows."""
    sizes = check(op, ("out", out, "T K", FLOAT32), ("x", x, "T K", FLOAT32))
    for weight in weights:
        if weight is None:
            continue
        per_row = len(weight.shape) == 2
        check(op, ("x", x, "T K", FLOAT32), ("weight", weight, "W K" if per_row else "K", FLOAT32))
        if per_row and (not weight.shape[0] or sizes["T"] % weight.shape[0]):
            raise ValueError(f"{op}: {sizes['T']} rows do not repeat {weight.shape[0]} weights")


def check_gate(out: Array, x: Array, gate: Array) -> None:
    """Hold the arguments of `Ops.add_gated` to their shapes."""
    sizes = check("add_gated", ("out", out, "T K", FLOAT32), ("x", x, "T K", FLOAT32), ("gate", gate, "T one", FLOAT32))
    if sizes["one"] != 1:
        raise ValueError(f"add_gated: gate has shape {list(gate.shape)}, expected [T 1]")


def check_place(out: Array, x: Array, to: int, start: int, width: int) -> None:
    """Hold the arguments of `Ops.place` to their shapes."""
    check("place", ("out", out, "T H D", FLOAT32), ("x", x, "T heads from", FLOAT32))
    inside = 0 <= to <= out.shape[2] - width and 0 <= start <= x.shape[2] - width
    if width < 0 or not inside or x.shape[1] not in (1, out.shape[1]):
        shapes = f"{list(x.shape)} to {to} of {list(out.shape)}"
        raise ValueError(f"place: {width} elements from {start} of {shapes} do not fit")


def check_swap(out: Array, x: Array, to: int, start: int, width: int) -> None:
    """Hold the arguments of `Ops.swap` to their shapes."""
    check("swap", ("out", out, "A B D", FLOAT32), ("x", x, "B A from", FLOAT32))
    if width < 0 or not 0 <= to <= out.shape[2] - width or not 0 <= start <= x.shape[2] - width:
        shapes = f"{list(x.shape)} to {to} of {list(out.shape)}"
        raise ValueError(f"swap: {width} elements from {start} of {shapes} do not fit")


def check_route(
    weights: Array,
    experts: Array,
    logits: Array,
    correction: Array | None,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
) -> None:
    """Hold the arguments of `Ops.route` to their shapes and kinds."""
    sizes = check(
        "route",
        ("weights", weights, "T k", FLOAT32),
        ("experts", experts, "T k", INT32),
        ("logits", logits, "T E", FLOAT32),
        ("correction", correction, "E", FLOAT32),
    )
    if score not in ("softmax", "sigmoid", "sparsemixer") or group_score not in ("max", "top2"):
        raise ValueError(f"route: score {score!r} or group_score {group_score!r} is unknown")
    if score == "sparsemixer" and (sizes["k"] != 2 or groups != 1):
        raise ValueError("route: sparsemixer chooses 2 experts, without groups")
    each, left = divmod(sizes["E"], max(1, groups))
    short = sizes["k"] > each * top_groups or (group_score == "top2" and each < 2)
    if left or short or not 0 < top_groups <= groups:
        raise ValueError(f"route: {sizes['k']} of {sizes['E']} experts in {top_groups} of {groups} groups")


def check_groups(rows: Array, slots: Array, offsets: Array, experts: Array) -> None:
    """Hold the arguments of `Ops.group_rows` to their shapes."""
    sizes = check(
        "group_rows",
        ("rows", rows, "places", INT32),
        ("slots", slots, "T k", INT32),
        ("offsets", offsets, "E+1", INT32),
        ("experts", experts, "T k", INT32),
    )
    if sizes["places"] != sizes["T"] * sizes["k"] or not sizes["E+1"]:
        raise ValueError(f"group_rows: {sizes['places']} places for {sizes['T']} x {sizes['k']} pairs")


def check_experts(
    out: Array,
    x: Array,
    offsets: Array | None,
    bounds: Sequence[int],
    weights: Sequence[Array],
    bias: Array | None,
) -> list[tuple[int, slice]]:
    """Hold the arguments of `Ops.matmul_experts` to each other; `bounds` are the values of offsets, if there are any.

    Returns the matrices that have rows, each with these.
    """
    sizes = check(
        "matmul_experts",
        ("out", out, "P N", FLOAT32),
        ("x", x, "P K", FLOAT32),
        ("offsets", offsets, "E+1", INT32),
        ("bias", bias, "E N", FLOAT32),
    )
    if offsets is None:
        each, left = divmod(sizes["P"], len(weights))
        if left:
            raise ValueError(f"matmul_experts: {sizes['P']} rows for {len(weights)} matrices")
        bounds = range(0, sizes["P"] + 1, each) if each else [0] * (len(weights) + 1)
    elif sizes["E+1"] != len(weights) + 1:
        raise ValueError(f"matmul_experts: offsets are not for {len(weights)} matrices")
    if sizes.get("E", len(weights)) != len(weights):
        raise ValueError(f"matmul_experts: bias is not for {len(weights)} matrices")
    if list(bounds) != sorted(bounds) or bounds[0] < 0 or bounds[-1] > sizes["P"]:
        raise ValueError(f"matmul_experts: offsets do not ascend within {sizes['P']} rows")
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]


def check_together(outs: Sequence[Array], weights: Sequence[Array], biases: Sequence[Array | None]) -> None:
    """Hold the arguments of `Ops.matmul_together` to each other."""
    if not len(outs) == len(weights) == len(biases) > 0:
        raise ValueError(f"matmul_together: {len(outs)} outs, {len(weights)} weights and {len(biases)} biases")
    if len({dtype_name(weight) for weight in weights}) > 1:
        raise ValueError("matmul_together: weights are stored in several dtypes")


def check_mask(logits: Array, rows: Array, masks: Array) -> None:
    """Hold the arguments of `Ops.mask` to their shapes."""
    sizes = check(
        "mask", ("logits", logits, "R V", FLOAT32), ("rows", rows, "M", INT32), ("masks", masks, "M W", INT32)
    )
    if sizes["W"] != -(-sizes["V"] // 32):
        raise ValueError(f"mask: {sizes['W']} words of 32 tokens for a vocabulary of {sizes['V']}")


def check_sample(
    tokens: Array,
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    uniform: Array,
    typical_p: Array | None,
    xtc_threshold: Array | None,
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
        ("typical_p", typical_p, "R", FLOAT32),
        ("xtc_threshold", xtc_threshold, "R", FLOAT32),
    )
