"""Models with states: estimates beside what is allocated, and how states and blocks share the cache's memory."""

from __future__ import annotations

import pytest

from tests.loading.test_memory import SEATS
from tests.models.harness import Rig, make
from tests.models.tiny import TinyModels, tokens
from tramontane.config import CacheConfig
from tramontane.errors import InvalidRequest, OutOfMemory
from tramontane.loading import memory
from tramontane.loading.build import load_model
from tramontane.models.spec import ModelSpec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


def spec_of(tiny: TinyModels, name: str) -> ModelSpec:
    return load_model(tiny.get(name).path, make("reference")).spec


@pytest.mark.parametrize("name", ["lfm2", "mamba2-biases", "granite-hybrid", "qwen3-next"])
def test_workspace_and_cache_are_as_large_as_estimated(name: str, tiny: TinyModels) -> None:
    rig = Rig(load_model(tiny.get(name).path, make("reference")).decoder, num_blocks=20)
    spec, states = rig.decoder.spec, rig.cache.num_states
    rig.run(tokens(5))
    assert rig.workspace.nbytes == memory.workspace_bytes(spec, 256, logits_rows=256)
    size = memory.state_bytes(spec)
    assert rig.cache.nbytes == 20 * memory.block_bytes(spec, 4, "float32") + states * size
    kept = [array for index, layer in enumerate(spec.layers) if layer.state for array in rig.cache.state(index)]
    assert size * states == sum(array.nbytes for array in kept)


def test_states_take_at_most_half_of_the_cache(tiny: TinyModels) -> None:
    spec = spec_of(tiny, "lfm2")
    size, block = memory.state_bytes(spec), memory.block_bytes(spec, 16, "float32")

    def resolved(cache: CacheConfig, free: int = 1 << 40) -> tuple[int, int]:
        states = memory.resolve_num_states(spec, cache, SEATS, free)
        return states, memory.resolve_num_blocks(spec, cache, SEATS, 128, free, "float32")

    assert resolved(CacheConfig()) == (16, 4 * 8), "four seats, and three states to remember for each"
    assert resolved(CacheConfig(prefix_caching=False)) == (4, 4 * 8)
    assert resolved(CacheConfig(num_blocks=9)) == (16, 9)
    budget = 20 * block + 2 * size
    states, blocks = resolved(CacheConfig(memory_bytes=budget))
    assert states == min(16, budget // 2 // size)
    assert blocks == (budget - states * size) // block
    context = memory.fitting_context(spec, CacheConfig(memory_bytes=budget), SEATS, 1 << 40, "float32")
    assert context == min(spec.context_length, 16 * blocks)
    with pytest.raises(InvalidRequest, match=r"memory_bytes.*no state"):
        resolved(CacheConfig(memory_bytes=size))
    with pytest.raises(OutOfMemory, match="no state"):
        resolved(CacheConfig(), free=4 * size)


def test_a_model_without_attention_has_states_alone(tiny: TinyModels) -> None:
    spec = spec_of(tiny, "mamba2")
    size = memory.state_bytes(spec)
    assert memory.resolve_num_states(spec, CacheConfig(memory_bytes=5 * size), SEATS, 1 << 40) == 5
    assert memory.resolve_num_blocks(spec, CacheConfig(), SEATS, 1 << 20, 1 << 40, "float32") == 0
    assert memory.fitting_context(spec, CacheConfig(), SEATS, 1 << 40, "float32") == spec.context_length
    with pytest.raises(InvalidRequest, match="num_blocks"):
        memory.resolve_num_blocks(spec, CacheConfig(num_blocks=9), SEATS, 128, 1 << 40, "float32")
