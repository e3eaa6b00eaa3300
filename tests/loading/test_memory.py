"""Estimates beside what is then really allocated, and the rules for the size of the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.loading.checkpoints import write_folder
from tests.models.harness import Rig
from tramontane.config import CacheConfig, SchedulerConfig
from tramontane.errors import InvalidRequest, OutOfMemory
from tramontane.kernels.cells import CELLS
from tramontane.kernels.reference import ReferenceOps
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext, GroupContext
from tramontane.loading import memory
from tramontane.loading.build import LoadedModel, checked_plan, load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.models.spec import ModelSpec, cache_groups

OPS = ReferenceOps(threads=1, deterministic=False)
SEATS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_folder(tmp_path_factory.mktemp("memory") / "m"), OPS)


@pytest.fixture
def spec(loaded: LoadedModel) -> ModelSpec:
    return loaded.spec


def windowed(spec: ModelSpec, window: int = 20) -> ModelSpec:
    """The same model with a window in its second layer."""
    return replace(
        spec,
        layers=(spec.layers[0], replace(spec.layers[1], attention=replace(spec.layers[1].attention, window=window))),
    )


def test_the_workspace_is_as_large_as_estimated(loaded: LoadedModel) -> None:
    step, rows = Workspace(OPS, 32), Workspace(OPS, 8)
    ids, ends = np.arange(5, dtype=np.int32), np.array([0, 5], np.int32)
    groups = (GroupContext(slots=ids, block_tables=np.zeros((1, 1), np.int32)),)
    batch = BatchContext(5, 1, ids, ids, ends, ends[1:], groups)
    hidden = loaded.decoder.forward(batch, loaded.decoder.new_cache(4, 16, "float32"), step)
    loaded.decoder.logits(hidden, np.array([4], np.int32), rows)
    assert step.nbytes + rows.nbytes == memory.workspace_bytes(loaded.spec, 32, logits_rows=8)


@pytest.mark.parametrize("dtype", CELLS)
def test_the_cache_is_as_large_as_estimated(loaded: LoadedModel, dtype: str) -> None:
    cache = loaded.decoder.new_cache(7, 16, dtype)
    assert cache.nbytes == 7 * memory.block_bytes(loaded.spec, 16, dtype)
    assert cache.nbytes == sum(array.nbytes for layer in range(2) for array in cache.layer(layer))
    assert memory.block_bytes(loaded.spec, 16, dtype) == 16 * memory.kv_bytes_per_token(loaded.spec, dtype)


def test_groups_share_the_pool(spec: ModelSpec) -> None:
    """Two groups of one layer: half the bytes a block, twice the blocks."""
    mixed = windowed(spec)
    assert len(cache_groups(mixed)) == 2
    assert memory.block_bytes(mixed, 16, "float32") == memory.block_bytes(spec, 16, "float32") // 2
    assert memory.blocks_per_sequence(spec, CacheConfig(), 128) == 8
    assert memory.blocks_per_sequence(mixed, CacheConfig(), 128) == 8 + 3
    assert memory.blocks_per_sequence(mixed, CacheConfig(paged_attention=False), 128) == 16


def test_a_window_touches_no_more_blocks_than_counted(spec: ModelSpec) -> None:
    for window in range(1, 40):
        counted = memory.blocks_per_sequence(windowed(spec, window), CacheConfig(block_size=8), 128) - 16
        seen = [{position // 8 for position in range(max(0, at - window + 1), at + 1)} for at in range(128)]
        assert counted == max(map(len, seen))


def resolve(spec: ModelSpec, cache: CacheConfig, free: int = 1 << 40, context: int = 128) -> int:
    return memory.resolve_num_blocks(spec, cache, SEATS, context, free, "float16")


def test_the_size_follows_the_configuration(spec: ModelSpec) -> None:
    size = memory.block_bytes(spec, 16, "float16")
    assert resolve(spec, CacheConfig(num_blocks=21)) == 21
    assert resolve(spec, CacheConfig(memory_bytes=21 * size + size - 1)) == 21
    assert resolve(spec, CacheConfig(memory_fraction=0.5), free=42 * size) == 21
    assert resolve(spec, CacheConfig()) == 4 * 8
    assert resolve(spec, CacheConfig(), free=4 * 13 * size) == 13
    assert resolve(windowed(spec), CacheConfig()) == 4 * (8 + 3) + 4  # four blocks of a step's 64 tokens


def test_a_cache_too_small_for_one_context_says_what_it_needs(spec: ModelSpec) -> None:
    for cache, field in (
        (CacheConfig(num_blocks=7), "num_blocks"),
        (CacheConfig(memory_bytes=1000), "memory_bytes"),
        (CacheConfig(memory_fraction=0.001), "memory_fraction"),
    ):
        with pytest.raises(InvalidRequest, match=rf"{field}.*128 tokens needs 8 blocks") as caught:
            resolve(spec, cache, free=1_000_000)
        assert caught.value.field == field
    with pytest.raises(OutOfMemory, match=r"quarter of the free memory.*needs 8 blocks"):
        resolve(spec, CacheConfig(), free=30_000)
    assert resolve(spec, CacheConfig(num_blocks=7), context=112) == 7


def test_the_longest_context_that_fits(spec: ModelSpec) -> None:
    size = memory.block_bytes(spec, 16, "float16")

    def fits(cache: CacheConfig, of: ModelSpec = spec, free: int = 1 << 30) -> int:
        return memory.fitting_context(of, cache, SchedulerConfig(), free, "float16")

    assert fits(CacheConfig()) == spec.context_length
    assert fits(CacheConfig(num_blocks=7)) == 112
    assert fits(CacheConfig(memory_bytes=3 * size + 1)) == 48
    assert fits(CacheConfig(memory_fraction=0.5), free=10 * size) == 80
    assert fits(CacheConfig(), free=8 * size) == 32
    assert fits(CacheConfig(), free=0) == 16
    for blocks in range(4, 20):  # what fits is what `resolve_num_blocks` accepts, and one block more is not
        context = fits(CacheConfig(num_blocks=blocks), windowed(spec))
        assert resolve(windowed(spec), CacheConfig(num_blocks=blocks), context=context) == blocks
        if context < spec.context_length:
            with pytest.raises(InvalidRequest):
                resolve(windowed(spec), CacheConfig(num_blocks=blocks), context=context + 1)


def test_a_cache_beyond_memory_is_refused(spec: ModelSpec) -> None:
    for cache in (CacheConfig(num_blocks=1000), CacheConfig(memory_bytes=1 << 22)):
        with pytest.raises(OutOfMemory, match="does not fit in"):
            resolve(spec, cache, free=1_000_000)


def test_the_estimate_adds_up_without_loading(tmp_path: Path, spec: ModelSpec) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path / "m"))
    estimate = memory.estimate(checked_plan(checkpoint), context_length=128, batch=4)
    assert estimate.cache == 32 * memory.block_bytes(spec, 16, "float32")
    assert estimate.total == estimate.weights + estimate.cache + estimate.workspace
    half = memory.estimate(checked_plan(checkpoint), context_length=128, batch=4, dtype="float16")
    vectors = 4 * 32 * 5
    assert half.weights - vectors == (estimate.weights - vectors) // 2
    assert half.cache == estimate.cache // 2


def test_copies_move_whole_blocks_of_every_layer(loaded: LoadedModel) -> None:
    rig = Rig(loaded.decoder, block_size=4, num_blocks=16)
    ids = list(range(10))
    first = rig.sequence()
    rig.step((first, ids[:6]))
    child = rig.fork(first, 1)
    # The partly filled second block is copied, then both go on in their own.
    copied = rig.free.pop()
    rig.cache.copy([(first.tables[0][1], copied)])
    child.tables[0].append(copied)
    child.tokens += ids[4:6]
    ours, theirs = rig.step((child, ids[6:]), (first, [20, 21, 22]))
    assert np.array_equal(ours, Rig(loaded.decoder).run(ids, [6])[6:])
    assert np.array_equal(theirs, Rig(loaded.decoder).run([*ids[:6], 20, 21, 22], [6])[6:])
