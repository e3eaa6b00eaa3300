"""Deterministic mode: what a request gets does not depend on who else is there, on memory running out, on threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.checkpoints import VOCAB, Rig, load, prompt, request, rig
from tests.kernels.modules import DETERMINISTIC, make
from tramontane.config import CacheConfig, CacheDType, EngineConfig, SchedulerConfig
from tramontane.engine.sequence import EngineRequest

COUNT = 64


def config(num_batched_tokens: int = 96, prefix_caching: bool = True, dtype: CacheDType = "auto") -> EngineConfig:
    cache = CacheConfig(block_size=4, prefix_caching=prefix_caching, dtype=dtype)
    return EngineConfig(cache, SchedulerConfig(COUNT, num_batched_tokens))


def requests() -> list[EngineRequest]:
    """Of different lengths: every second greedy, the others with seeds and all that sampling knows."""
    sampled = {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "logprobs": 3,
    }
    return [
        request(
            f"{number}",
            prompt(40 if number % 8 == 0 else 1 + number % 7, number),
            seed=number,
            max_tokens=8 + number % 23,
            min_tokens=number % 4,
            **({"temperature": 0.0} if number % 2 else sampled),
        )
        for number in range(COUNT)
    ]


def assert_same(one: Rig, other: Rig, all_requests: list[EngineRequest]) -> None:
    for each in all_requests:
        assert one.tokens[(each.id, 0)] == other.tokens[(each.id, 0)], each.id
        assert one.ends[(each.id, 0)].finish_reason == other.ends[(each.id, 0)].finish_reason


def is_slow(module: str) -> bool:
    return module.startswith("torch")


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(*p.values, marks=[*p.marks, pytest.mark.slow] if is_slow(str(p.values[0])) else p.marks)
        for p in DETERMINISTIC
    ],
)
def test_together_as_alone_in_a_pool_that_is_too_small(module: str, checkpoint: Path) -> None:
    everyone = requests()
    loaded = load(checkpoint, make(module))
    alone = rig(loaded, config(), 400)
    for one in everyone:
        alone.run([one])
    assert alone.engine.stats().preemptions == 0

    for threads in (1,) if module.startswith("reference") else (1, 2):  # the reference has one
        crowded = rig(load(checkpoint, make(module, threads)), config(), 70).run(everyone)
        assert crowded.engine.stats().preemptions > 2
        assert_same(crowded, alone, everyone)
    assert len({tuple(alone.ids(one.id)) for one in everyone}) > COUNT // 2, "the model must say different things"


@pytest.mark.parametrize("dtype", ["float32", "int8", "fp8"])
def test_chunk_sizes_and_the_prefix_cache_change_nothing(dtype: CacheDType, checkpoint: Path) -> None:
    """A prompt in one piece, in many, and out of the cache, which may be quantized."""
    loaded = load(checkpoint, make("reference/deterministic"))
    shared = prompt(60)
    everyone = [
        request(f"{number}", (*shared[: 20 + number], number), seed=number, max_tokens=5, logprobs=VOCAB)
        for number in range(12)
    ]
    whole = rig(loaded, config(700, False, dtype), 400).run(everyone)
    pieces = rig(loaded, config(13, False, dtype), 400).run(everyone)
    cached = rig(loaded, config(700, True, dtype), 400).run(everyone[:3]).run(everyone[3:])
    assert whole.engine.stats().cached_tokens == 0
    assert cached.engine.stats().cached_tokens > 100
    assert_same(pieces, whole, everyone)
    assert_same(cached, whole, everyone)
