"""gpt-oss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models.cases.base import LLAMA, Case, rope

_GPT_OSS: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "swiglu_limit": 0.8,
    **rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5, truncate=False),
}

_SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}


def in_mxfp4(model: Any, folder: Path) -> None:
    """A checkpoint with the experts in MXFP4, as OpenAI's have them; the model gets the values that they stand for, by
    transformers' own reading."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = parameter.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
            parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            tensors.pop(name)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


_ROUND = rope("yarn", factor=4.0, original_max_position_embeddings=32)

_WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5}

CASES: Mapping[str, Case] = {
    "gpt-oss-wide": Case("gpt_oss", {**_GPT_OSS, **_WIDE, **_ROUND}, gguf=True),
    "gpt-oss": Case("gpt_oss", _GPT_OSS),
    "gpt-oss, experts in MXFP4": Case("gpt_oss", {**_GPT_OSS, **_SIZES}, save=in_mxfp4),
}
