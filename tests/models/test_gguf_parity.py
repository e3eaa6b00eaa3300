"""The GGUF route to the same logits: llama.cpp's names, order of rotary pairs, keys and block formats."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from tests.models.as_gguf import write_gguf
from tests.models.harness import KERNELS, MAIN, Rig, make
from tests.models.tiny import CASES, TinyModels, tokens
from tramontane.loading.build import load_model

LENGTH = 75


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gguf])
def test_gguf_logits_are_those_of_transformers(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    tiny, ids = tiny_models.get(name), tokens(LENGTH)
    write_gguf(tiny.model, tmp_path / "tiny.gguf", told=tiny.case.told)
    loaded = load_model(tmp_path / "tiny.gguf", make(str(MAIN.values[0])))
    assert loaded.spec.tied_embeddings == tiny.model.config.tie_word_embeddings
    logits = Rig(loaded.decoder).run(ids, [20, 1, 30])
    assert np.abs(logits - tiny.logits(ids)).max() < 2e-4


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("stored", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_stored_formats_are_computed_as_they_say(
    stored: str, kernels: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Against transformers with the values that the gguf package reads back from what it stored."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tiny, ids = tiny_models.get("llama-wide"), tokens(LENGTH)
    modules = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    write_gguf(tiny.model, tmp_path / "tiny.gguf", dict.fromkeys(modules, stored))
    kind = gguf.GGMLQuantizationType[stored]
    rounded = copy.deepcopy(tiny.model)
    with tiny.torch.no_grad():
        for value in rounded.parameters():
            if value.dim() == 2:
                read = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)
                value.copy_(tiny.torch.from_numpy(read))
    loaded = load_model(tmp_path / "tiny.gguf", make(f"{kernels}/deterministic"))
    assert set(loaded.formats.values()) == {stored}
    logits = Rig(loaded.decoder).run(ids, [20, 1, 30])
    assert np.abs(logits - tiny.logits(ids, rounded)).max() < 2e-4
