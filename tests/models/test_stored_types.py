"""Matrices kept in fewer bits, in families of every kind: our logits beside transformers' with the values that the
stored ones have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.as_gguf import write_gguf
from tests.models.harness import MAIN, Rig, make
from tests.models.tiny import Tiny, TinyModels, tokens
from tramontane.loading.build import load_model

KINDS = ["phi", "phi3", "gemma2", "stablelm-parallel", "gpt2", "bloom", "falcon-groups"]
"""Parallel and not, fused tensors of each layout, tied and not, transposed."""
_MODULES = (
    *("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_gate", "ffn_up", "ffn_down"),
)


def _rounded(tiny: Tiny, through: Callable[[Any], Any]) -> Any:
    """A copy of the model whose matrices went through a storage format, row by row."""
    model = copy.deepcopy(tiny.model)
    with tiny.torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2 and "norm" not in name and "wpe" not in name:
                stored = value.T if "c_" in name else value
                read = through(stored.contiguous())
                value.copy_(read.T if "c_" in name else read)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16(name: str, tiny_models: TinyModels) -> None:
    tiny, ids = tiny_models.get(name), tokens(75)
    rounded = _rounded(tiny, lambda value: value.bfloat16().float())
    if name == "gpt2":
        rounded.transformer.wpe.weight.data = rounded.transformer.wpe.weight.data.bfloat16().float()
    loaded = load_model(tiny.path, make(f"{MAIN.values[0]}/deterministic"), dtype="bfloat16")
    assert set(loaded.formats.values()) == {"BF16"}
    logits = Rig(loaded.decoder).run(ids, [20, 1, 30])
    assert np.abs(logits - tiny.logits(ids, rounded)).max() < 2e-4


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_gguf(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tiny, ids, kind = tiny_models.get(name), tokens(75), gguf.GGMLQuantizationType.Q8_0

    def through(value: Any) -> Any:
        read = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)
        return tiny.torch.from_numpy(read)

    write_gguf(tiny.model, tmp_path / "tiny.gguf", dict.fromkeys(_MODULES, "Q8_0"))
    loaded = load_model(tmp_path / "tiny.gguf", make(f"{MAIN.values[0]}/deterministic"))
    assert set(loaded.formats.values()) - {"F32"} == {"Q8_0"}
    logits = Rig(loaded.decoder).run(ids, [20, 1, 30])
    assert np.abs(logits - tiny.logits(ids, _rounded(tiny, through))).max() < 2e-4
