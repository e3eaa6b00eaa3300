"""Our decoder beside transformers' on tiny random checkpoints: all of them on the CPU's module, some on every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.harness import KERNELS, MAIN, Rig, make
from tests.models.tiny import CASES, Tiny, TinyModels, tokens
from tramontane.layers.context import REPLAYED_ROWS
from tramontane.loading.build import load_model
from tramontane.loading.memory import workspace_bytes

TOLERANCE = 2e-4
LENGTH = 75


@dataclass
class Pair:
    tiny: Tiny
    rig: Rig

    def check(self, logits: NDArray[Any], ids: list[int], start: int = 0) -> None:
        expected = self.tiny.logits(ids)[start:]
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() < TOLERANCE


EVERYWHERE = ("llama-biases-tied", "llama-llama3", "qwen2-windows", "qwen2-yarn")
EVERYWHERE += ("gemma2", "stablelm-parallel", "mpt-clipped", "opt-post-norm")
EVERYWHERE += ("qwen2-moe", "deepseek-v3", "gpt-oss", "phimoe", "olmoe", "glm4")
PAIRS = [
    pytest.param((name, kind.values[0]), id=f"{name}-{kind.values[0]}", marks=kind.marks)
    for kind in KERNELS
    for name in (CASES if kind is MAIN else EVERYWHERE)
    if not CASES[name].by_length
]


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Pair:
    name, kernels = request.param
    tiny = tiny_models.get(name)
    return Pair(tiny, Rig(load_model(tiny.path, make(kernels)).decoder))


def test_full_prefill(pair: Pair) -> None:
    ids = tokens(LENGTH)
    pair.check(pair.rig.run(ids), ids)
    if any(attention.makes_keys for attention in pair.rig.decoder.spec.attentions):
        pair.rig.run(tokens(REPLAYED_ROWS + 1))  # which shorter prompts do not
    workspace = pair.rig.workspace
    assert workspace.nbytes == workspace_bytes(pair.rig.decoder.spec, workspace.max_rows, workspace.max_rows)


def test_chunked_prefill(pair: Pair) -> None:
    ids = tokens(LENGTH, 1)
    pair.check(pair.rig.run(ids, [7, 1, 13, 5, 31]), ids)


def test_token_by_token(pair: Pair) -> None:
    ids = tokens(LENGTH, 2)
    pair.check(pair.rig.run(ids, [3] + [1] * LENGTH), ids)


def test_prefix_hit(pair: Pair) -> None:
    rig = pair.rig
    first, other = tokens(24, 3), tokens(LENGTH, 4)
    parent = rig.sequence()
    rig.step((parent, first[:8]))
    # Two blocks stay shared while both go on; they are inside every window at the time of the fork.
    child = rig.fork(parent, 2)
    logits = rig.step((child, other[8:20]), (parent, first[8:]))
    pair.check(logits[0], first[:8] + other[8:20], 8)
    pair.check(logits[1], first, 8)


def test_mixed_batch(pair: Pair) -> None:
    """Prefill, the rest of a prefill and decoding rows of sequences of different lengths, in one batch each step."""
    rig = pair.rig
    ids = [tokens(length, length) for length in (50, 33, 9, 41)]
    sequences = [rig.sequence() for _ in ids]
    feeds = ((20, 5, 0, 1), (1, 17, 4, 30), (28, 1, 1, 1), (1, 10, 4, 9))
    at = [0] * 4
    for step in feeds:
        work = [(i, ids[i][at[i] : at[i] + n]) for i, n in enumerate(step) if n]
        results = rig.step(*((sequences[i], fed) for i, fed in work))
        for (i, fed), logits in zip(work, results, strict=True):
            pair.check(logits, ids[i][: at[i] + len(fed)], at[i])
            at[i] += len(fed)
    assert at == [len(one) for one in ids]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_greedy(name: str, tiny_models: TinyModels) -> None:
    tiny, prompt = tiny_models.get(name), tokens(11, 5)
    rig = Rig(load_model(tiny.path, make(str(MAIN.values[0]))).decoder)
    sequence, fed, out = rig.sequence(), prompt, []
    for _ in range(64):
        fed = [int(rig.step((sequence, fed))[0][-1].argmax())]
        out += fed
    assert out == tiny.greedy(prompt, 64)
