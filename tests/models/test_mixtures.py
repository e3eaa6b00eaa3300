"""Mixtures of experts: the same choices as transformers makes, nothing done for experts that are not chosen, and every
layout that their tensors come in."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.kernels.modules import DETERMINISTIC
from tests.models.as_gguf import interleave, write_gguf
from tests.models.harness import KERNELS, MAIN, Rig, make
from tests.models.tiny import Tiny, TinyModels, tokens
from tramontane.kernels.workspace import Workspace
from tramontane.layers.moe import MoE
from tramontane.loading.build import load_model
from tramontane.loading.memory import workspace_bytes
from tramontane.models.decoder import Decoder
from tramontane.weights import CodedWeight, Experts, Weight

CHOOSING = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "granite-moe", "deepseek-v2-groups", "deepseek-v3"]
CHOOSING += ["gpt-oss", "phimoe", "ernie-moe", "glm4-moe"]


@pytest.mark.parametrize("name", CHOOSING)
def test_experts_and_weights_are_those_of_transformers(name: str, tiny_models: TinyModels) -> None:
    tiny = tiny_models.get(name)
    met: list[tuple[Any, Any]] = []

    def keep(module: Any, given: tuple[Any, ...], result: tuple[Any, ...]) -> None:
        met.append((given[0].reshape(-1, given[0].shape[-1]).numpy(), (result[1].numpy(), result[2].numpy())))

    hooks = [each.register_forward_hook(keep) for each in tiny.model.modules() if "Router" in type(each).__name__]
    try:
        tiny.logits(tokens(40))
    finally:
        for hook in hooks:
            hook.remove()
    decoder = load_model(tiny.path, make(str(MAIN.values[0]))).decoder
    mixtures = [layer.mlp for layer in decoder._layers if isinstance(layer.mlp, MoE)]
    assert len(met) == len(mixtures) > 0
    workspace = Workspace(decoder.ops, 64)
    for (x, (weights, experts)), mixture in zip(met, mixtures, strict=True):
        x = np.ascontiguousarray(x, np.float32)
        ours = mixture.router(decoder.ops, decoder.ops.from_host(x), len(x), workspace)
        theirs = np.take_along_axis(weights, np.argsort(experts), axis=1), np.sort(experts)
        chosen = decoder.ops.to_host(ours[1])
        assert np.array_equal(np.sort(chosen), theirs[1])
        np.testing.assert_allclose(np.take_along_axis(ours[0], np.argsort(chosen), axis=1), theirs[0], atol=1e-5)


class Untouchable:
    """In place of a weight, one whose array is none: it must not be met."""

    nbytes = 0

    def __init__(self, weight: Weight) -> None:
        assert weight.single is not None
        self.shape, self.format = weight.shape, weight.format
        self.single = (object(), weight.single[1])


@pytest.mark.parametrize("kernels", KERNELS)
def test_experts_without_rows_are_not_touched(
    kernels: str, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may hold anything, and no product is asked for: what is left of them cannot be multiplied."""
    loaded, ids = load_model(tiny_models.get("qwen3-moe-all").path, make(kernels)), tokens(2)
    met: set[int] = set()
    product = loaded.ops.matmul_experts

    def noted(out: Any, x: Any, offsets: Any, weights: Sequence[Any], *given: Any) -> None:
        bounds = loaded.ops.to_host(offsets).tolist()
        met.update(id(weight) for weight, (a, b) in zip(weights, pairwise(bounds), strict=True) if a < b)
        product(out, x, offsets, weights, *given)

    monkeypatch.setattr(loaded.ops, "matmul_experts", noted)
    expected = Rig(loaded.decoder).run(ids)
    parameters, left = dict(loaded.decoder.parameters), 0
    for name, parameter in parameters.items():
        if isinstance(parameter, Experts):
            arrays = [each.single[0] for each in parameter.weights if each.single]
            pairs = zip(parameter.weights, arrays, strict=True)
            kept = [each if id(array) in met else Untouchable(each) for each, array in pairs]
            left += sum(isinstance(each, Untouchable) for each in kept)
            parameters[name] = Experts(loaded.ops, kept)  # type: ignore[arg-type]
    assert left > 9  # of 54
    assert np.array_equal(Rig(Decoder(loaded.spec, parameters, loaded.ops)).run(ids), expected)


@pytest.mark.parametrize("kernels", DETERMINISTIC)
@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss"])
def test_a_row_does_not_feel_its_neighbours(name: str, kernels: str, tiny_models: TinyModels) -> None:
    """Bit for bit: a sequence alone, and among others whose tokens go to other experts."""
    decoder = load_model(tiny_models.get(name).path, make(kernels)).decoder
    ids, rig = tokens(30), Rig(decoder)
    one, other, third = rig.sequence(), rig.sequence(), rig.sequence()
    parts = [
        rig.step((other, tokens(20, 1)), (one, ids[:9]))[1],
        rig.step((one, ids[9:10]), (third, tokens(7, 2)), (other, [5]))[0],
        rig.step((third, [7]), (one, ids[10:]))[1],
    ]
    assert np.array_equal(np.concatenate(parts), Rig(decoder).run(ids))


# ---- layouts of their tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "granite-moe-shared", "deepseek-v3", "ernie-moe", "phimoe"])
def test_tensors_of_all_experts_are_read_as_those_of_each(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """As transformers holds them, beside what it writes, which is what is published."""
    tiny, ids = tiny_models.get(name), tokens(20)
    held = {key: value.numpy() for key, value in tiny.model.state_dict().items()}
    if name == "ernie-moe":  # of a name that is never stored
        held = {key.replace(".gate.moe_statics.", ".moe_statics."): value for key, value in held.items()}
    assert any("experts.gate_up_proj" in key for key in held)
    save_file({key: np.ascontiguousarray(value) for key, value in held.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    ops = make("reference/deterministic")
    logits = [Rig(load_model(path, ops).decoder).run(ids) for path in (tmp_path, tiny.path)]
    assert np.array_equal(*logits)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe"])
def test_layers_that_guess_at_further_tokens_are_left_out(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    tiny = tiny_models.get(name)
    tensors = load_file(tiny.path / "model.safetensors")
    last = tiny.model.config.num_hidden_layers
    spare = {key.replace(".0.", f".{last}.", 1): value for key, value in tensors.items() if ".layers.0." in key}
    spare |= {f"model.layers.{last}.{part}.weight": np.ones(48, np.float32) for part in ("eh_proj", "shared_head.norm")}
    save_file({**tensors, **spare}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    ids = tokens(20)
    assert np.abs(Rig(load_model(tmp_path, make("reference")).decoder).run(ids) - tiny.logits(ids)).max() < 2e-4


def test_mixtral_in_its_own_layout(tiny_models: TinyModels, tmp_path: Path) -> None:
    tiny, ids = tiny_models.get("mixtral"), tokens(40)
    config, stored = tiny.model.config, load_file(tiny.path / "model.safetensors")
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    names = {
        "model.": "",
        "self_attn.": "attention.",
        **{f"{part}_proj": f"w{part}" for part in "qkvo"},
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
    }
    tensors = {}
    for name, values in stored.items():
        turned = next((interleave(values, count) for part, count in heads.items() if part in name), values)
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = turned
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "moe": {"num_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok},
    }
    (tmp_path / "params.json").write_text(json.dumps(params), encoding="utf-8")
    save_file(tensors, tmp_path / "consolidated.safetensors")
    logits = Rig(load_model(tmp_path, make("reference")).decoder).run(ids)
    assert np.abs(logits - tiny.logits(ids)).max() < 2e-4


# ---- in fewer bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS)
def test_experts_of_gpt_oss_stay_in_mxfp4(kernels: str, tiny_models: TinyModels) -> None:
    tiny, ids = tiny_models.get("gpt-oss, experts in MXFP4"), tokens(40)
    loaded = load_model(tiny.path, make(f"{kernels}/deterministic"))
    for part in ("gate", "up", "down"):
        experts = loaded.decoder.parameters[f"layers.1.moe.experts.{part}"]
        assert all(isinstance(weight, CodedWeight) and weight.format == "FP4" for weight in experts.weights)
    assert np.abs(Rig(loaded.decoder).run(ids, [11, 1]) - tiny.logits(ids)).max() < 2e-4


WIDE = ["qwen2-moe-wide", "deepseek-v3-wide", "gpt-oss-wide", "granite-moe-wide"]


def _through(tiny: Tiny, through: Any) -> Any:
    """A copy of the model whose matrices went through a storage format, row by row, those of experts too."""
    model = copy.deepcopy(tiny.model)
    for name, value in model.named_parameters():
        if value.dim() >= 2 and "norm" not in name:
            turned = "gpt_oss" in tiny.model.config.model_type and value.dim() == 3
            stored = (value.transpose(-1, -2) if turned else value).detach().contiguous()
            if not name.endswith("_bias"):
                read = through(stored)
                value.data.copy_(read.transpose(-1, -2) if turned else read)
    return model


@pytest.mark.parametrize("name", WIDE)
def test_bfloat16(name: str, tiny_models: TinyModels) -> None:
    tiny, ids = tiny_models.get(name), tokens(40)
    loaded = load_model(tiny.path, make(f"{MAIN.values[0]}/deterministic"), dtype="bfloat16")
    assert set(loaded.formats.values()) == {"BF16"}
    expected = tiny.logits(ids, _through(tiny, lambda value: value.bfloat16().float()))
    assert np.abs(Rig(loaded.decoder).run(ids, [20, 1]) - expected).max() < 2e-4


MATRICES = [
    *("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_a", "attn_q_b"),
    *("attn_kv_a_mqa", "attn_kv_b", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp", "ffn_gate_inp_shexp"),
    *(f"ffn_{part}_{which}" for part in ("gate", "up", "down") for which in ("exps", "shexp")),
]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", WIDE)
def test_blocks_of_gguf(name: str, kind: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tiny, ids, stored = tiny_models.get(name), tokens(40), gguf.GGMLQuantizationType[kind]

    def through(value: Any) -> Any:
        return tiny.torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), stored), stored))

    write_gguf(tiny.model, tmp_path / "tiny.gguf", dict.fromkeys(MATRICES, kind))
    loaded = load_model(tmp_path / "tiny.gguf", make(f"{MAIN.values[0]}/deterministic"))
    turned = {name for name in loaded.formats if name.endswith("k_up")}
    assert {format for name, format in loaded.formats.items() if name not in turned} == {kind}
    assert all(loaded.formats[name] == "F32" for name in turned)
    expected = tiny.logits(ids, _through(tiny, through))
    assert np.abs(Rig(loaded.decoder).run(ids, [20, 1]) - expected).max() < 2e-4


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_latent_attention_that_was_cut_a_head(kind: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """As llama.cpp's converter writes it by now: keys' part turned, as we want it."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tiny, ids, stored = tiny_models.get("deepseek-v3-wide"), tokens(40), gguf.GGMLQuantizationType[kind]

    def through(values: Any) -> Any:
        read = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(values), stored), stored)
        return tiny.torch.from_numpy(read)

    write_gguf(tiny.model, tmp_path / "t.gguf", dict.fromkeys(["attn_k_b", "attn_v_b"], kind), "deepseek_v3, cut")
    loaded = load_model(tmp_path / "t.gguf", make(f"{MAIN.values[0]}/deterministic"))
    assert loaded.formats["layers.1.attention.v_up"] == loaded.formats["layers.1.attention.k_up"] == kind
    model, config = copy.deepcopy(tiny.model), tiny.model.config
    for layer in model.model.layers:
        weight = layer.self_attn.kv_b_proj.weight.data
        heads = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads[:, : config.qk_nope_head_dim], heads[:, config.qk_nope_head_dim :]
        keys.copy_(through(keys.transpose(1, 2).numpy()).transpose(1, 2))
        values.copy_(through(values.numpy()))
    assert np.abs(Rig(loaded.decoder).run(ids, [20, 1]) - tiny.logits(ids, model)).max() < 2e-4


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v3", "gpt-oss", "mixtral"])
def test_estimates_know_the_buffers(name: str, tiny_models: TinyModels) -> None:
    loaded = load_model(tiny_models.get(name).path, make("reference"))
    rig = Rig(loaded.decoder)
    rig.run(tokens(140), [5])
    assert rig.workspace.nbytes == workspace_bytes(loaded.spec, 256, logits_rows=256)


def test_randomness_reaches_what_is_learned_of_routers(tiny_models: TinyModels) -> None:
    """That the tests above can fail: corrections, sinks and biases are not at zero."""
    for name, part in (("deepseek-v3", "e_score_correction_bias"), ("gpt-oss", "sinks"), ("gpt-oss", "router.bias")):
        tiny = tiny_models.get(name)
        learned = [value for key, value in tiny.model.state_dict().items() if key.endswith(part)]
        assert learned
        assert all(value.abs().max() > 0.1 for value in learned)
