"""Memory: what a model, its cache and a step take, known from the spec before anything is loaded.

Owns these estimates, the size of the cache and the choice of its dtype. Must not know: how memory is measured, which
requests will come.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from tramontane.config import CacheConfig, SchedulerConfig
from tramontane.errors import InvalidRequest, OutOfMemory
from tramontane.kernels.cells import CELLS
from tramontane.layers.latent import made_cells, made_shapes
from tramontane.loading.binding import Binding
from tramontane.loading.tensors import TensorEntry
from tramontane.models.decoder import slot_shapes
from tramontane.models.spec import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    KeptSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    StateSpec,
    cache_groups,
    state_shapes,
)
from tramontane.records import dataclass

ITEMSIZE: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
DENSE: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dense storage formats and the dtypes they are."""
LOGITS_ROWS = 64
"""Rows of logits that a step computes at once."""

_LEFT_FREE = 4
"""Without a configured size the cache takes at most one part in so many of the free memory."""
_REMEMBERED = 3
"""States a seat that the prefix cache remembers, where there is room."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


@dataclass(frozen=True)
class Plan:
    """What a checkpoint will become: its parameters by canonical name, and the tensors that they are made of."""

    spec: ModelSpec
    bindings: Mapping[str, Binding]
    tensors: Mapping[str, TensorEntry]

    def formats(self, dtype: str = "auto") -> dict[str, str]:
        """Format of each matrix by canonical name, as it will be kept: `dtype` converts the dense ones. What is to be
        turned and is no dense matrix becomes floats."""
        converted = {name: format for format, name in DENSE.items()}.get(dtype)
        stored = {
            name: self.tensors[binding.tensor].format
            for name, binding in self.bindings.items()
            if binding.kind != "vector"
        }
        for name, format in stored.items():
            if self.bindings[name].pieces[0].turned and format not in DENSE:
                stored[name] = "F32"
        return {name: converted if converted and format in DENSE else format for name, format in stored.items()}

    def parameter_bytes(self, name: str, format: str) -> int:
        """Bytes of one parameter kept in `format`: its own, or a dense one it is converted to."""
        binding = self.bindings[name]
        if self.tensors[binding.tensor].format == format:
            return binding.nbytes
        return math.prod(binding.shape) * ITEMSIZE[DENSE[format]]

    def weight_bytes(self, formats: Mapping[str, str]) -> int:
        """Bytes of all parameters once loaded; `formats` of the matrices as `formats()` gives them."""
        return sum(self.parameter_bytes(name, formats.get(name, "F32")) for name in self.bindings)

    def turned_bytes(self, formats: Mapping[str, str]) -> int:
        """Bytes of what is kept turned besides: of latent attention, to make keys."""
        layers = [i for i, layer in enumerate(self.spec.layers) if layer.attention and layer.attention.makes_keys]
        names = [f"layers.{i}.attention.k_up" for i in layers]
        kept = [ITEMSIZE[DENSE.get(formats[name], "float32")] for name in names]
        return sum(math.prod(self.bindings[name].shape) * size for name, size in zip(names, kept, strict=True))

    def dense_dtype(self, formats: Mapping[str, str]) -> str:
        """The dtype of most dense matrices by bytes; float32 where all are quantized."""
        sizes: Counter[str] = Counter()
        for name, format in formats.items():
            if format in DENSE:
                sizes[DENSE[format]] += self.parameter_bytes(name, format)
        return sizes.most_common(1)[0][0] if sizes else "float32"


def estimate(
    plan: Plan,
    *,
    context_length: int,
    batch: int,
    dtype: str = "auto",
    cache_dtype: str = "auto",
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
) -> MemoryEstimate:
    """What `batch` sequences of `context_length` tokens need at the same time, weights included; of a model that only
    reads, what the largest step does."""
    spec, stored = plan.spec, plan.formats(dtype)
    rows = step_rows(spec, max_num_batched_tokens, context_length)
    if not spec.generates:
        scratch = -(-rows // block_size) * scratch_block_bytes(spec, block_size)
        return MemoryEstimate(plan.weight_bytes(stored), scratch, workspace_bytes(spec, rows))
    seats = SchedulerConfig(max_num_seqs=batch, max_num_batched_tokens=max_num_batched_tokens)
    blocks = _blocks_wanted(spec, CacheConfig(block_size=block_size), seats, context_length)
    resolved = resolve_cache_dtype(cache_dtype, stored.values())
    return MemoryEstimate(
        weights=plan.weight_bytes(stored) + plan.turned_bytes(stored),
        cache=blocks * block_bytes(spec, block_size, resolved) + batch * state_bytes(spec),
        workspace=workspace_bytes(spec, rows, cache_dtype=resolved),
    )


def resolve_cache_dtype(choice: str, formats: Iterable[str]) -> str:
    """`auto` is float32 where every matrix is F32, else float16."""
    if choice != "auto":
        return choice
    return "float32" if set(formats) == {"F32"} else "float16"


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """Keys and values of one token in all layers (in those with a window, while it is in sight)."""
    layers = spec.attentions
    return sum(_token_bytes(dtype, *layer.cached) for layer in layers)


def _token_bytes(dtype: str, heads: int, *sizes: int) -> int:
    """What a token's heads take in a cache of that dtype, scales included."""
    cells = CELLS[dtype]
    return heads * sum(cells.width(size) for size in sizes) * cells.itemsize


def state_bytes(spec: ModelSpec) -> int:
    """What all layers with a state keep of one sequence, however long it is."""
    return 4 * sum(math.prod(shape) for state in spec.states for shape in state_shapes(state))


def block_bytes(spec: ModelSpec, block_size: int, dtype: str) -> int:
    """One block of the pool: block_size tokens in the layers of one cache group."""
    return block_size * sum(_token_bytes(dtype, *shape) for shape in slot_shapes(spec))


def scratch_block_bytes(spec: ModelSpec, block_size: int) -> int:
    """One block of `Decoder.new_scratch`."""
    return sum(heads * sum(sizes) for heads, *sizes in set(slot_shapes(spec))) * block_size * ITEMSIZE["float32"]


def step_rows(spec: ModelSpec, max_num_batched_tokens: int, context_length: int) -> int:
    """Tokens of the largest step: a model that sees both ways reads a text whole."""
    return max_num_batched_tokens if spec.causal else max(max_num_batched_tokens, context_length)


def workspace_bytes(
    spec: ModelSpec, max_num_batched_tokens: int, logits_rows: int = LOGITS_ROWS, cache_dtype: str = "float32"
) -> int:
    """Buffers of the largest step: those of `Decoder.forward`, and of `logits_rows` rows of `Decoder.logits`."""
    # One buffer for every width that some layer has: layers of equal widths share theirs.
    widths = {("hidden", spec.hidden_size), ("branch", spec.hidden_size), ("embedding", spec.embedding_size or 0)}
    for layer in spec.layers:
        widths |= {*_attention_widths(layer.attention), *_state_widths(layer.state)}
        widths |= {*_mlp_widths(layer.mlp, spec.hidden_size)}
        widths |= {("second", spec.hidden_size)} if layer.parallel else set()
    angles = sum(rope.dim for rope in {attention.rope for attention in spec.attentions} if rope is not None)
    per_token = sum(width for _, width in widths) + angles
    head = spec.hidden_size + spec.vocab_size + (spec.embedding_size or 0) if spec.head else 0
    experts = {layer.mlp.num_experts + 1 for layer in spec.layers if isinstance(layer.mlp, MoESpec)}
    made = sum(_made_bytes(each, max_num_batched_tokens, cache_dtype) for each in set(map(_heads, spec.attentions)))
    return 4 * (max_num_batched_tokens * per_token + logits_rows * head + sum(experts)) + made


_Heads = tuple[int, int, int]


def _heads(spec: AttentionSpec) -> _Heads:
    """Of which keys and values are made anew: how many, and their sizes."""
    return (spec.num_heads, spec.head_dim, spec.value_size) if spec.makes_keys else (0, 0, 0)


def _made_bytes(heads: _Heads, rows: int, cache_dtype: str) -> int:
    """A stretch of such keys and values."""
    cells = made_cells(CELLS[cache_dtype])
    return sum(math.prod(shape) for shape in made_shapes(cells, rows, *heads)) * cells.itemsize


def _attention_widths(spec: AttentionSpec | None) -> Iterator[tuple[str, int]]:
    """Buffers of `layers.attention`, elements a token."""
    if spec is None:
        return
    kv_heads, key_size, value_size = spec.cached
    yield "q", spec.num_heads * spec.head_dim
    yield "k", kv_heads * key_size
    yield "v", kv_heads * value_size
    if spec.latent is None:
        yield "attended", spec.num_heads * value_size
        yield "attention.gate", spec.num_heads * value_size if spec.output_gate else 0
        return
    yield "q_down", spec.latent.q_rank or 0
    yield "kv_down", key_size + value_size
    yield "absorbed", spec.num_heads * (key_size + value_size)
    yield "attended", spec.num_heads * key_size
    yield "latents", spec.num_heads * key_size
    yield "heads", spec.num_heads * (spec.head_dim - value_size)
    yield "heads", spec.num_heads * spec.value_size
    yield "values", spec.num_heads * spec.value_size
    yield "totals", spec.num_heads if spec.makes_keys else 0


def _state_widths(spec: StateSpec | None) -> Iterator[tuple[str, int]]:
    """Buffers of `layers.state`, elements a token."""
    if spec is None or isinstance(spec, KeptSpec):
        return
    yield "state.mixed", spec.channels
    yield "state.convolved", spec.channels
    if isinstance(spec, ConvSpec):
        yield "state.gate", spec.channels
        return
    yield "state.gate", spec.inner_size
    yield "state.scanned", spec.inner_size
    yield "state.step", spec.num_heads
    if isinstance(spec, DeltaSpec):
        keys = spec.num_key_heads * spec.key_dim
        yield from (("state.rate", spec.num_heads), ("state.q", keys), ("state.k", keys), ("state.v", spec.inner_size))


def _mlp_widths(spec: MLPSpec | MoESpec | None, hidden: int) -> Iterator[tuple[str, int]]:
    """Buffers of `layers.mlp` and `layers.moe`, elements a token."""
    if spec is None:
        return
    if isinstance(spec, MLPSpec):
        yield "up", spec.intermediate_size
        if spec.gated:
            yield "gate", spec.intermediate_size
        return
    inner = spec.top_k * spec.expert.intermediate_size
    yield "moe.logits", spec.num_experts
    for name in ("weights", "experts", "tokens", "slots"):
        yield f"moe.{name}", spec.top_k
    yield "moe.rows", spec.top_k * hidden
    yield "moe.up", inner
    if spec.expert.gated:
        yield "moe.gate", inner
    if spec.shared is not None:
        yield "moe.shared", hidden
        yield from _mlp_widths(spec.shared, hidden)
    if spec.shared_gate:
        yield "moe.shared_gate", 1


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


def _cache_budget(cache: CacheConfig, free_bytes: int) -> tuple[str, int]:
    """The field that sets how many bytes the cache may take, "" for none, and how many; where the field is num_blocks,
    what it may take besides."""
    if cache.memory_bytes is not None:
        return "memory_bytes", cache.memory_bytes
    if cache.memory_fraction is not None:
        return "memory_fraction", int(free_bytes * cache.memory_fraction)
    return "", free_bytes // _LEFT_FREE


def resolve_num_states(spec: ModelSpec, cache: CacheConfig, scheduler: SchedulerConfig, free_bytes: int) -> int:
    """How many states the cache has places for: one a seat, and more to remember; 0 for a model without states.

    Beside keys and values they take at most half of what the cache may take; then fewer sequences run at once. Raises
    InvalidRequest or OutOfMemory where there is no room for one.
    """
    size = state_bytes(spec)
    if not size:
        return 0
    field, budget = _cache_budget(cache, free_bytes)
    remembered = _REMEMBERED if cache.prefix_caching and cache.paged_attention else 0
    count = min(scheduler.max_num_seqs * (1 + remembered), (budget // 2 if spec.attentions else budget) // size)
    if count:
        return count
    need = f"{shown(budget)} of cache hold no state of {shown(size)}, which each sequence of this model keeps"
    remedy = "Give the cache more room (memory_bytes, memory_fraction), or free memory."
    raise InvalidRequest(field, need, remedy) if field else OutOfMemory(need, remedy)


def resolve_num_blocks(
    spec: ModelSpec,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    context_length: int,
    free_bytes: int,
    dtype: str,
) -> int:
    """How many blocks the cache gets, by the rules of `CacheConfig`; `dtype` is the cache's, resolved. 0 for a model
    without attention.

    Raises InvalidRequest where a configured size cannot hold one sequence of the full context, and OutOfMemory where
    the size, or that one sequence, does not fit in `free_bytes`.
    """
    size = block_bytes(spec, cache.block_size, dtype)
    states = state_bytes(spec) * resolve_num_states(spec, cache, scheduler, free_bytes)
    if not size:
        if cache.num_blocks is not None:
            raise InvalidRequest("num_blocks", "a model without attention has no blocks in its cache", "Leave it out.")
        return 0
    least = blocks_per_sequence(spec, cache, context_length)
    budget = _cache_budget(cache, free_bytes)[1] - states
    remedy = "Set a smaller context_length or a larger cache (num_blocks, memory_bytes, memory_fraction)."
    if cache.num_blocks is not None:
        field, blocks = "num_blocks", cache.num_blocks
    elif cache.memory_bytes is not None:
        field, blocks = "memory_bytes", budget // size
    elif cache.memory_fraction is not None:
        field, blocks = "memory_fraction", budget // size
    else:
        wanted = _blocks_wanted(spec, cache, scheduler, context_length)
        field, blocks = "", min(wanted, budget // size)
    need = f"one sequence of {context_length} tokens needs {least} blocks of {size} bytes, {shown(least * size)}"
    if blocks < least and field:
        raise InvalidRequest(field, f"it gives a cache of {blocks} blocks where {need}", remedy)
    if blocks < least:
        less = f", less {shown(states)} of states," if states else ","
        quarter = shown(free_bytes // _LEFT_FREE)
        raise OutOfMemory(f"a quarter of the free memory, {quarter}{less} is too small: {need}", remedy)
    if blocks * size + states > free_bytes:
        needed = shown(blocks * size + states)
        raise OutOfMemory(f"a cache of {needed} does not fit in {shown(free_bytes)} of free memory")
    return blocks


def fitting_context(
    spec: ModelSpec, cache: CacheConfig, scheduler: SchedulerConfig, free_bytes: int, dtype: str
) -> int:
    """The longest context, up to the model's, of which the configured cache holds one sequence; at least one block."""
    size = block_bytes(spec, cache.block_size, dtype)
    if not size:
        return spec.context_length
    if cache.num_blocks is not None:
        blocks = cache.num_blocks
    else:
        states = state_bytes(spec) * resolve_num_states(spec, cache, scheduler, free_bytes)
        blocks = (_cache_budget(cache, free_bytes)[1] - states) // size
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
