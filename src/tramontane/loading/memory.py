"""Memory: what a model, its cache and a step take, known from the spec before anything is loaded.

Owns these estimates, the size of the cache and the choice of its dtype. Must not know: how memory is measured, which
requests will come.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tramontane.config import CacheConfig, SchedulerConfig
from tramontane.errors import InvalidRequest, OutOfMemory
from tramontane.loading.checkpoint import Checkpoint, TensorEntry
from tramontane.models.decoder import slot_shapes
from tramontane.models.spec import ModelSpec, cache_groups

ITEMSIZE: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
DENSE: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dense storage formats and the dtypes they are."""
LOGITS_ROWS = 64
"""Rows of logits that a step computes at once."""

_LEFT_FREE = 4
"""Without a configured size the cache takes at most one part in so many of the free memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def estimate(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    context_length: int,
    batch: int,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
) -> MemoryEstimate:
    """What `batch` sequences of `context_length` tokens need at the same time, weights included."""
    stored = stored_formats(checkpoint, dtype)
    seats = SchedulerConfig(max_num_seqs=batch, max_num_batched_tokens=max_num_batched_tokens)
    blocks = _blocks_wanted(spec, CacheConfig(block_size=block_size), seats, context_length)
    resolved = resolve_cache_dtype(cache_dtype, stored.values())
    return MemoryEstimate(
        weights=weight_bytes(checkpoint, stored),
        cache=blocks * block_bytes(spec, block_size, resolved),
        workspace=workspace_bytes(spec, max_num_batched_tokens),
    )


def stored_formats(checkpoint: Checkpoint, dtype: str = "auto") -> dict[str, str]:
    """Format of each matrix by canonical name, as it will be kept: `dtype` converts the dense ones."""
    converted = {name: format for format, name in DENSE.items()}.get(dtype)
    formats = {}
    for name, tensor in checkpoint.parameters.items():
        entry = checkpoint.tensors[tensor]
        if len(entry.shape) == 2:
            formats[name] = converted if converted and entry.format in DENSE else entry.format
    return formats


def weight_bytes(checkpoint: Checkpoint, formats: Mapping[str, str]) -> int:
    """Bytes of all parameters once loaded; `formats` of the matrices as `stored_formats` gives them."""
    entries = {name: checkpoint.tensors[tensor] for name, tensor in checkpoint.parameters.items()}
    return sum(parameter_bytes(entry, formats.get(name, "F32")) for name, entry in entries.items())


def parameter_bytes(entry: TensorEntry, format: str) -> int:
    """Bytes of one parameter kept in `format`: its own, or a dense one it is converted to."""
    return entry.nbytes if entry.format == format else math.prod(entry.shape) * ITEMSIZE[DENSE[format]]


def resolve_cache_dtype(choice: str, formats: Iterable[str]) -> str:
    """`auto` is float32 where every matrix is F32, else float16."""
    if choice != "auto":
        return choice
    return "float32" if set(formats) == {"F32"} else "float16"


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """Keys and values of one token in all layers (in those with a window, while it is in sight)."""
    return sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers) * ITEMSIZE[dtype]


def block_bytes(spec: ModelSpec, block_size: int, dtype: str) -> int:
    """One block of the pool: block_size tokens in the layers of one cache group."""
    return sum(2 * heads * head_dim for heads, head_dim in slot_shapes(spec)) * block_size * ITEMSIZE[dtype]


def workspace_bytes(spec: ModelSpec, max_num_batched_tokens: int, logits_rows: int = LOGITS_ROWS) -> int:
    """Buffers of the largest step: those of `Decoder.forward`, and of `logits_rows` rows of `Decoder.logits`."""
    # One buffer for every width that some layer has: layers of equal widths share theirs.
    widths = {("hidden", spec.hidden_size), ("branch", spec.hidden_size)}
    for layer in spec.layers:
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        widths |= {("q", q), ("attended", q), ("k", kv), ("v", kv)}
        widths |= {("gate", layer.intermediate_size), ("up", layer.intermediate_size)}
    angles = sum(rope.dim for rope in {layer.rope for layer in spec.layers})
    per_token = sum(width for _, width in widths) + angles
    return 4 * (max_num_batched_tokens * per_token + logits_rows * (spec.hidden_size + spec.vocab_size))


def blocks_per_sequence(spec: ModelSpec, cache: CacheConfig, context_length: int) -> int:
    """The blocks, over all cache groups, that one sequence of `context_length` tokens must be able to hold at once.

    A group with a window needs those that a window can touch, wherever it falls on the borders of blocks; without
    paged attention every group holds the whole context.
    """
    whole = -(-context_length // cache.block_size)
    windows = [group.window if cache.paged_attention else None for group in cache_groups(spec)]
    return sum(whole if w is None else min(whole, -(-(w - 1) // cache.block_size) + 1) for w in windows)


def _blocks_wanted(spec: ModelSpec, cache: CacheConfig, scheduler: SchedulerConfig, context_length: int) -> int:
    """Blocks for every seat's full context, and for what a step adds before windows let go of what they passed."""
    windows = [group.window for group in cache_groups(spec) if group.window is not None and cache.paged_attention]
    step = -(-scheduler.max_num_batched_tokens // cache.block_size) * len(windows)
    return scheduler.max_num_seqs * blocks_per_sequence(spec, cache, context_length) + step


def resolve_num_blocks(
    spec: ModelSpec,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    context_length: int,
    free_bytes: int,
    dtype: str,
) -> int:
    """How many blocks the cache gets, by the rules of `CacheConfig`; `dtype` is the cache's, resolved.

    Raises InvalidRequest where a configured size cannot hold one sequence of the full context, and OutOfMemory where
    the size, or that one sequence, does not fit in `free_bytes`.
    """
    size = block_bytes(spec, cache.block_size, dtype)
    least = blocks_per_sequence(spec, cache, context_length)
    remedy = "Set a smaller context_length or a larger cache (num_blocks, memory_bytes, memory_fraction)."
    if cache.num_blocks is not None:
        field, blocks = "num_blocks", cache.num_blocks
    elif cache.memory_bytes is not None:
        field, blocks = "memory_bytes", cache.memory_bytes // size
    elif cache.memory_fraction is not None:
        field, blocks = "memory_fraction", int(free_bytes * cache.memory_fraction) // size
    else:
        wanted = _blocks_wanted(spec, cache, scheduler, context_length)
        field, blocks = "", min(wanted, free_bytes // _LEFT_FREE // size)
    need = f"one sequence of {context_length} tokens needs {least} blocks of {size} bytes, {shown(least * size)}"
    if blocks < least and field:
        raise InvalidRequest(field, f"it gives a cache of {blocks} blocks where {need}", remedy)
    if blocks < least:
        quarter = shown(free_bytes // _LEFT_FREE)
        raise OutOfMemory(f"a quarter of the free memory, {quarter}, is too small: {need}", remedy)
    if blocks * size > free_bytes:
        raise OutOfMemory(f"a cache of {shown(blocks * size)} does not fit in {shown(free_bytes)} of free memory")
    return blocks


def fitting_context(spec: ModelSpec, cache: CacheConfig, free_bytes: int, dtype: str) -> int:
    """The longest context, up to the model's, of which the configured cache holds one sequence; at least one block."""
    size = block_bytes(spec, cache.block_size, dtype)
    if cache.num_blocks is not None:
        blocks = cache.num_blocks
    elif cache.memory_bytes is not None:
        blocks = cache.memory_bytes // size
    elif cache.memory_fraction is not None:
        blocks = int(free_bytes * cache.memory_fraction) // size
    else:
        blocks = free_bytes // _LEFT_FREE // size
    whole = -(-spec.context_length // cache.block_size)
    # monotonic: a longer context never needs fewer blocks
    held = bisect_right(
        range(1, whole + 1), blocks, key=lambda n: blocks_per_sequence(spec, cache, n * cache.block_size)
    )
    return min(spec.context_length, max(1, held) * cache.block_size)


def check_weights_fit(needed: int, free_bytes: int) -> None:
    """Raises OutOfMemory where weights of `needed` bytes do not fit."""
    if needed > free_bytes:
        raise OutOfMemory(
            f"the weights take {shown(needed)}, {shown(free_bytes)} of memory are free",
            "Use a smaller model or a stronger quantization, or free memory.",
        )


def shown(nbytes: int) -> str:
    """Bytes for people, in binary units."""
    value = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{nbytes} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
