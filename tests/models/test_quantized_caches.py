"""Models over caches in int8 and fp8: near to transformers' logits, however the context came into the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.kernels.modules import make
from tests.models.harness import KERNELS, Rig
from tests.models.tiny import TinyModels, tokens
from tramontane.kernels import Ops
from tramontane.loading.build import load_model
from tramontane.models.decoder import Decoder

LENGTH = 75
NEAR = {"int8": 0.03, "fp8": 0.15}
"""Of the spread of logits, by the median: random models amplify, and experts change places."""


def decoder_of(path: Path, ops: Ops) -> Decoder:
    decoder = load_model(path, ops).decoder
    assert isinstance(decoder, Decoder)
    return decoder


NAMES = ["llama-llama3", "qwen2-windows", "gemma2", "deepseek-v3", "gpt-oss"]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_near(name: str, dtype: str, kernels: str, tiny_models: TinyModels) -> None:
    """Whole, in chunks, and from blocks that another sequence began."""
    tiny, ids = tiny_models.get(name), tokens(LENGTH)
    expected = tiny.logits(ids)
    rig = Rig(decoder_of(tiny.path, make(kernels)), dtype=dtype)
    whole, chunked = rig.run(ids), rig.run(ids, [7, 1, 13, 5, 31])
    parent = rig.sequence()
    (first,) = rig.step((parent, ids[:40]))
    (rest,) = rig.step((rig.fork(parent, 40 // rig.block_size), ids[40:]))
    for logits in (whole, chunked, np.concatenate((first, rest))):
        assert np.median(np.abs(logits - expected)) < NEAR[dtype] * expected.std()


@pytest.mark.parametrize("name", ["qwen2-windows", "llama-biases-tied"])
def test_biases_far_larger_than_keys_cost_nothing(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """As Qwen2.5's, in elements that rotation hardly turns."""
    shutil.copytree(tiny_models.get(name).path, tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    tensors = load_file(file)
    biases = [tensor for key, tensor in tensors.items() if key.endswith("k_proj.bias")]
    assert biases
    ops = make("reference")
    shifted = []
    for large in (0, 300):
        for bias in biases:
            spec = load_model(tmp_path / "m", make("reference")).spec.attentions[0]
            heads = bias.reshape(spec.num_kv_heads, spec.head_dim)
            heads[:, spec.head_dim // 2 - 1] = heads[:, -1] = large
        save_file(tensors, file, {"format": "pt"})
        decoder = decoder_of(tmp_path / "m", ops)
        exact = Rig(decoder).run(tokens(40))
        shifted.append(np.median(np.abs(Rig(decoder, dtype="int8").run(tokens(40)) - exact)) / exact.std())
    assert shifted[1] < 2 * shifted[0]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("model_type", ["biogpt", "codegen"])
def test_transformers_own_models_are_near(model_type: str, dtype: str, tmp_path: Path) -> None:
    """Through our attention, row by row, and through transformers' own, which reads our blocks."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.models import zoo
    from tests.models.fallback.test_fallback import load

    model = zoo.save_tiny(model_type, tmp_path)
    ids = [int(token) for token in np.random.default_rng(3).integers(3, zoo.VOCAB, 40)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    for module in ("cpu", "torch"):
        rig = Rig(load(tmp_path, make(module)).model, dtype=dtype)  # type: ignore[arg-type]
        for logits in (rig.run(ids), rig.run(ids, [7, 1, 13, 19])):
            assert np.median(np.abs(logits - expected)) < NEAR[dtype] * expected.std()
