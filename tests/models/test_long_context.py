"""Stretched positions at lengths on both sides of each threshold, equal to those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models.as_gguf import write_gguf
from tests.models.harness import KERNELS, MAIN, Rig, make
from tests.models.tiny import CASES, TinyModels, tokens
from tramontane.loading.build import load_model

STRETCHED = [
    "llama-linear", "llama-llama3", "llama-yarn", "qwen2-yarn", "gemma3", "llama-dynamic", "phi3-longrope",
    "phimoe-longrope", "olmo3", "deepseek-v3", "gpt-oss",
]  # fmt: skip
LENGTHS = (31, 32, 33, 140)
"""32 is the original length of all."""


@pytest.mark.parametrize("name", STRETCHED)
def test_lengths_on_both_sides_of_the_threshold(name: str, tiny_models: TinyModels) -> None:
    """At once, and in chunks of a sequence whose length is known."""
    tiny = tiny_models.get(name)
    decoder = load_model(tiny.path, make(str(MAIN.values[0]))).decoder
    for length in LENGTHS:
        ids = tokens(length, length)
        tiny.logits(ids[:1])  # transformers' dynamic stretch stays that of the longest since a short one
        expected = tiny.logits(ids)
        for chunks in ([], [20, 1, 30]):
            assert np.abs(Rig(decoder, num_blocks=256).run(ids, chunks) - expected).max() < 2e-4


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", [name for name in STRETCHED if CASES[name].by_length])
def test_sequences_of_a_batch_have_each_their_own_stretch(name: str, kernels: str, tiny_models: TinyModels) -> None:
    tiny = tiny_models.get(name)
    rig = Rig(load_model(tiny.path, make(kernels)).decoder)
    every = [tokens(length, length) for length in (50, 20, 90)]
    results = rig.step(*((rig.sequence(), ids) for ids in every))
    for ids, logits in zip(every, results, strict=True):
        tiny.logits(ids[:1])
        assert np.abs(logits - tiny.logits(ids)).max() < 2e-4


@pytest.mark.parametrize("name", [name for name in STRETCHED if CASES[name].gguf])
def test_stretches_of_gguf_files(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    tiny = tiny_models.get(name)
    write_gguf(tiny.model, tmp_path / "tiny.gguf")
    decoder = load_model(tmp_path / "tiny.gguf", make(str(MAIN.values[0]))).decoder
    for length in LENGTHS:
        ids = tokens(length, length)
        assert np.abs(Rig(decoder, num_blocks=256).run(ids) - tiny.logits(ids)).max() < 2e-4
