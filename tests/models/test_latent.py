"""Latent attention: what its cache holds is the vector that heads share, and logits are those of transformers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.modules import make
from tests.models.harness import KERNELS, Rig
from tests.models.tiny import TinyModels, tokens
from tramontane.kernels.cells import CELLS
from tramontane.loading import memory
from tramontane.loading.build import load_model

NAMES = ["deepseek-v2", "deepseek-v3", "deepseek-v3-wide"]
NEAR = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 8e-3, "int8": 0.03, "fp8": 0.15}
"""Of the spread of logits, by the median: random models amplify, and experts change places."""


@pytest.mark.parametrize("dtype", CELLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_takes_the_vector_and_the_rotated_part(name: str, dtype: str, tiny_models: TinyModels) -> None:
    """And, quantized, a scale of two bytes for each of them."""
    tiny = tiny_models.get(name)
    loaded, config, cells = load_model(tiny.path, make("reference")), tiny.model.config, CELLS[dtype]
    each = (config.kv_lora_rank + config.qk_rope_head_dim) * cells.itemsize + (4 if cells.top else 0)
    assert memory.kv_bytes_per_token(loaded.spec, dtype) == config.num_hidden_layers * each
    cache = loaded.decoder.new_cache(3, 16, dtype)
    assert cache.nbytes == 3 * 16 * config.num_hidden_layers * each == 3 * memory.block_bytes(loaded.spec, 16, dtype)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", CELLS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, dtype: str, kernels: str, tiny_models: TinyModels) -> None:
    """A prompt whole, in chunks, token by token, and behind blocks that another sequence began."""
    tiny, ids = tiny_models.get(name), tokens(60)
    expected = tiny.logits(ids)
    rig = Rig(load_model(tiny.path, make(kernels)).decoder, dtype=dtype)
    runs = [rig.run(ids), rig.run(ids, [7, 13, 20, *[1] * 19])]
    parent = rig.sequence()
    (first,) = rig.step((parent, ids[:40]))
    (rest,) = rig.step((rig.fork(parent, 40 // rig.block_size), ids[40:]))
    for logits in (*runs, np.concatenate((first, rest))):
        assert np.median(np.abs(logits - expected)) < NEAR[dtype] * expected.std()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_do_not_depend_on_chunks(kernels: str, dtype: str, tiny_models: TinyModels) -> None:
    ops = make(f"{kernels}/deterministic")
    rig = Rig(load_model(tiny_models.get("deepseek-v3").path, ops).decoder, dtype=dtype)
    ids = tokens(50)
    np.testing.assert_array_equal(rig.run(ids), rig.run(ids, [3, 1, 1, 30]))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", CELLS)
@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_long_prompts_make_keys_anew(name: str, dtype: str, kernels: str, tiny_models: TinyModels) -> None:
    """In one piece, in chunks whose contexts are several stretches, and beside sequences that do not: what transformers
    says, in a workspace as large as estimated."""
    tiny, ids = tiny_models.get(name), tokens(560)
    expected = tiny.logits(ids)
    loaded = load_model(tiny.path, make(kernels))
    rig = Rig(loaded.decoder, dtype=dtype, num_blocks=220)
    long, short, other = rig.sequence(), rig.sequence(), rig.sequence()
    steps = [
        [(long, 0, 200), (short, 0, 30)],
        [(short, 30, 31), (long, 200, 400), (other, 0, 20)],
        [(other, 20, 21), (short, 31, 32), (long, 400, 559)],
        [(long, 559, 560), (other, 21, 220), (short, 32, 33)],
    ]
    errors = []
    for step in steps:
        results = rig.step(*((sequence, ids[start:stop]) for sequence, start, stop in step))
        errors += [np.abs(logits - expected[a:b]) for logits, (_, a, b) in zip(results, step, strict=True)]
    assert np.median(np.concatenate(errors)) < NEAR[dtype] * expected.std()
    assert all(np.median(errors[i]) < 1.5 * NEAR[dtype] * expected.std() for i in (0, 3, 7))  # those made anew
    assert rig.workspace.nbytes == memory.workspace_bytes(loaded.spec, 256, 256, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_ways_to_attend_differ_by_rounding(dtype: str, tiny_models: TinyModels) -> None:
    """Deterministic ops take one of them, whatever the chunks."""
    model, ids = tiny_models.get("deepseek-v3").path, tokens(300)
    ways = (load_model(model, make(kind)).decoder for kind in ("reference", "reference/deterministic"))
    anew, fixed = (Rig(decoder, dtype=dtype) for decoder in ways)
    right = fixed.run(ids, [150])
    assert 0 < np.median(np.abs(anew.run(ids, [150]) - right)) < 0.5 * NEAR[dtype] * right.std()
    np.testing.assert_array_equal(fixed.run(ids, [7, 130]), right)
