"""Quantized tensors that hold several parameters, or one expert's: our logits beside transformers' with the values that
the stored ones have."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.loading.quantized.cases import CASES as METHODS
from tests.models.harness import MAIN, Rig, make
from tests.models.tiny import Tiny, TinyModels, tokens
from tramontane.loading.build import load_model

FUSED = ("qkv_proj", "gate_up_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")


def _quantized(tiny: Tiny, method: str, modules: tuple[str, ...], folder: Path) -> Any:
    """Writes the checkpoint with these modules quantized; the model with their values."""
    case, rng = METHODS[method], np.random.default_rng(7)
    tensors, values = load_file(tiny.path / "model.safetensors"), {}
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(modules) and ".layers." in name:
            stored, exact = case.write(rng, *tensors.pop(name).shape)
            # Values of a usual size, by scales that are smaller.
            factor = np.float32(2.0 ** -np.ceil(np.log2(np.abs(exact).max())))
            for key in ("scales", "weight_scale_inv"):
                if key in stored:
                    stored[key] = (stored[key].astype(np.float32) * factor).astype(stored[key].dtype)
            tensors |= {f"{module}.{key}": value for key, value in stored.items()}
            values[name] = exact * factor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((tiny.path / "config.json").read_text(encoding="utf-8"))
    config[case.key] = case.settings
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = copy.deepcopy(tiny.model)
    held = model.state_dict()
    for name, exact in values.items():
        _place(held, name, tiny.torch.from_numpy(np.ascontiguousarray(exact, np.float32)))
    return model


def _place(held: Any, name: str, value: Any) -> None:
    """Where the model has what a tensor is published as."""
    if name in held:
        held[name].copy_(value)
        return
    block, _, rest = name.partition(".experts.")
    number, part, _ = rest.split(".")
    if part == "down_proj":
        held[f"{block}.experts.down_proj"][int(number)].copy_(value)
    else:
        both, rows = held[f"{block}.experts.gate_up_proj"][int(number)], len(value)
        (both[:rows] if part == "gate_proj" else both[rows:]).copy_(value)


@pytest.mark.parametrize("method", ["gptq-4", "gptq-4-act-order", "awq", "fp8-blocks"])
@pytest.mark.parametrize(("name", "modules"), [("phi3", FUSED), ("deepseek-v3-wide", EXPERTS)])
def test_logits_are_those_of_the_values(
    name: str, modules: tuple[str, ...], method: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    tiny, ids = tiny_models.get(name), tokens(40)
    stored = _quantized(tiny, method, modules, tmp_path)
    loaded = load_model(tmp_path, make(f"{MAIN.values[0]}/deterministic"))
    assert METHODS[method].format in loaded.formats.values()
    expected = tiny.logits(ids, stored)
    assert np.abs(Rig(loaded.decoder).run(ids, [11, 1]) - expected).max() < 2e-4 * np.abs(expected).max()
