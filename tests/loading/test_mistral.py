"""Mistral's own layout, written here out of what transformers computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.models.harness import KERNELS, Rig, make
from tests.models.test_real_models import transformers_logits
from tramontane.errors import CorruptCheckpoint, TramontaneError, UnsupportedModel
from tramontane.loading.build import load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.sources import resolve
from tramontane.models.mistral_params import spec_from_params

PARAMS: dict[str, Any] = {
    "dim": 48,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 80,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 0.05,
    "vocab_size": 300,
    "rope_theta": 500.0,
}
YARN = {"original_max_position_embeddings": 16, "factor": 4.0, "beta": 4.0, "alpha": 1.0, "apply_scale": False}
_MODULES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def halves_to_neighbours(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The partners of a rotation, half a head apart in transformers' order of rows, beside one another."""
    pairs = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def tensors_of(model: Any, params: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The parameters of a transformers model under Mistral's names and in its order of rows."""
    out = {}
    for name, value in model.state_dict().items():
        module = name.removeprefix("model.layers.").removesuffix(".weight")
        layer, _, rest = module.partition(".")
        array = value.float().numpy()
        if rest in _MODULES and layer.isdigit():
            heads = {"self_attn.q_proj": params["n_heads"], "self_attn.k_proj": params["n_kv_heads"]}.get(rest)
            array = array if heads is None else halves_to_neighbours(array, heads)
            out[f"layers.{layer}.{_MODULES[rest]}.weight"] = array
        elif not (name.startswith("lm_head") and params.get("tied_embeddings")):
            out[f"{_MODULES[module]}.weight"] = array
    return out


def hf_yarn(params: dict[str, Any]) -> dict[str, Any]:
    """The rope_parameters that params.json's yarn means."""
    if "yarn" not in params:
        return {}
    yarn = dict(params["yarn"])
    mscales = {} if yarn.pop("apply_scale") else {"mscale": 1.0, "mscale_all_dim": 1.0}
    return {"rope_type": "yarn", "beta_fast": yarn.pop("beta"), "beta_slow": yarn.pop("alpha"), **yarn, **mscales}


def make_model(params: dict[str, Any], layer_types: list[str] | None = None) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    settings: dict[str, Any] = {
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "head_dim": params["head_dim"],
        "intermediate_size": params["hidden_dim"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": params["norm_eps"],
        "vocab_size": params["vocab_size"],
        "rope_parameters": {"rope_type": "default", "rope_theta": params["rope_theta"], **hf_yarn(params)},
        "tie_word_embeddings": params.get("tied_embeddings", False),
        "max_position_embeddings": 256,
        "attn_implementation": "eager",
    }
    if layer_types:
        kind, config = transformers.MinistralForCausalLM, transformers.MinistralConfig
        settings |= {"layer_types": layer_types, "sliding_window": 9}
    else:
        kind, config = transformers.MistralForCausalLM, transformers.MistralConfig
        settings["sliding_window"] = params.get("sliding_window")
    model = kind(config(**settings)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.4 * noise if value.dim() == 1 else noise * (1.6 / value.shape[1] ** 0.5))
    return model


def write(folder: Path, params: dict[str, Any], tensors: dict[str, NDArray[Any]], shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    names = sorted(tensors)
    for number in range(1, shards + 1):
        name = "consolidated.safetensors" if shards == 1 else f"consolidated-{number:05}-of-{shards:05}.safetensors"
        save_file({key: tensors[key] for key in names[number - 1 :: shards]}, folder / name)
    return folder


def random_tensors(params: dict[str, Any] = PARAMS) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    dim, inner = params["dim"], params["hidden_dim"]
    q, kv = (params["head_dim"] * params[key] for key in ("n_heads", "n_kv_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (params["vocab_size"], dim),
        "norm": (dim,),
        "output": (params["vocab_size"], dim),
    }
    for index in range(params["n_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "attention_norm": (dim,),
            "attention.wq": (q, dim),
            "attention.wk": (kv, dim),
            "attention.wv": (kv, dim),
            "attention.wo": (dim, q),
            "ffn_norm": (dim,),
            "feed_forward.w1": (inner, dim),
            "feed_forward.w2": (dim, inner),
            "feed_forward.w3": (inner, dim),
        }
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("changes", "kinds", "shards"),
    [
        ({}, None, 1),
        ({"sliding_window": 9, "max_seq_len": 256}, None, 3),
        ({"tied_embeddings": True}, None, 1),
        ({"sliding_window": [9, None]}, ["sliding_attention", "full_attention"], 2),
        ({"yarn": YARN, "max_seq_len": 256}, None, 1),
        ({"yarn": {**YARN, "apply_scale": True}, "max_seq_len": 256}, None, 1),
    ],
    ids=["plain", "window, shards", "tied", "windows by layer", "yarn", "yarn, scaled"],
)
def test_it_computes_what_transformers_computes(
    tmp_path: Path, kernels: str, changes: dict[str, Any], kinds: list[str] | None, shards: int
) -> None:
    params = {**PARAMS, **changes}
    model = make_model(params, kinds)
    folder = write(tmp_path / "m", params, tensors_of(model, params), shards)
    ids = [int(token) for token in np.random.default_rng(0).integers(0, params["vocab_size"], 40)]
    rig = Rig(load_model(resolve(folder), make(kernels)).decoder)
    assert np.abs(rig.run(ids, [7, 1]) - transformers_logits(model, ids)).max() < 2e-4


def test_what_the_file_leaves_out() -> None:
    spec = spec_from_params(PARAMS)
    assert (spec.context_length, spec.layers[0].attention.rope.theta, spec.layers[0].attention.rope.interleaved) == (
        32768,
        500.0,
        True,
    )
    assert spec_from_params({**PARAMS, "max_position_embeddings": 99}).context_length == 99
    untold = {key: value for key, value in PARAMS.items() if key != "rope_theta"}
    assert spec_from_params(untold).layers[0].attention.rope.theta == 1e6
    assert spec_from_params({**untold, "sliding_window": 4096}).layers[0].attention.rope.theta == 1e4
    assert spec_from_params({**PARAMS, "moe": None, "vision_encoder": {}, "q_lora_rank": None}) == spec
    assert spec_from_params({**PARAMS, "yarn": YARN}).context_length == 64


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"moe": {"num_experts": 8}}, CorruptCheckpoint, "num_experts_per_tok"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "top": 1}}, UnsupportedModel, "top"),
        ({"vision_encoder": {"hidden_size": 8}}, UnsupportedModel, "vision_encoder"),
        ({"multimodal": {"whisper_model_args": {}}}, UnsupportedModel, "multimodal"),
        ({"yarn": {**YARN, "apply_scale": None}}, UnsupportedModel, "yarn.*apply_scale.*true or false"),
        ({"yarn": {**YARN, "mscale": 2}}, UnsupportedModel, "yarn.*mscale"),
        ({"yarn": {**YARN, "beta": None}}, CorruptCheckpoint, "yarn.*beta is missing"),
        ({"yarn": {**YARN, "factor": "big"}}, CorruptCheckpoint, "yarn.*factor"),
        ({"yarn": 4}, CorruptCheckpoint, "yarn"),
        ({"llama_4_scaling": {"beta": 0.1}}, UnsupportedModel, "llama_4_scaling"),
        ({"model_type": "mamba"}, UnsupportedModel, "model_type"),
        ({"activation": "gelu"}, UnsupportedModel, "activation"),
        ({"dim": "wide"}, CorruptCheckpoint, "dim"),
        ({"n_kv_heads": 3}, CorruptCheckpoint, "n_kv_heads"),
        ({"head_dim": 15}, CorruptCheckpoint, "head_dim"),
        ({"sliding_window": [9, None, 9]}, CorruptCheckpoint, "sliding_window"),
        ({"sliding_window": ["x", None]}, CorruptCheckpoint, "sliding_window"),
        ({"n_layers": 10**9}, CorruptCheckpoint, "n_layers"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], kind: type[TramontaneError], word: str) -> None:
    with pytest.raises(kind, match=word):
        spec_from_params({**PARAMS, **changes})


def test_which_folders_are_of_that_layout(tmp_path: Path) -> None:
    tensors = random_tensors()
    folder = write(tmp_path / "m", PARAMS, tensors, 2)
    load_model(folder / "consolidated-00002-of-00002.safetensors", make("reference"))
    (folder / "config.json").write_text("{}")  # other libraries' settings may lie beside it
    assert open_checkpoint(folder).spec().hidden_size == 48
    (folder / "consolidated-00001-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="of 2 shards there are 1"):
        open_checkpoint(folder)
    (folder / "consolidated-00002-of-00002.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="model_type"):  # a Hugging Face checkpoint now
        open_checkpoint(folder).spec()


def quantized(model: Any, params: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors with the layers' matrices in fp8 as Mistral writes them; the model gets what those stand for."""
    import torch

    scales = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2 and ".layers." in name:
                scale = (value.abs().max() / 448).bfloat16().float()
                value.copy_((value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
                scales[name] = scale.numpy()
    tensors = tensors_of(model, params)
    for name, scale in scales.items():
        layer, _, rest = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        module = f"layers.{layer}.{_MODULES[rest]}"
        tensors[f"{module}.weight"] = (tensors[f"{module}.weight"] / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{module}.qscale_weight"] = np.array(scale, ml_dtypes.bfloat16)
        tensors[f"{module}.qscale_act"] = np.array(0.7, ml_dtypes.bfloat16)
    for kind in "kv":
        tensors[f"layers.0.attention.{kind}_fake_quantizer.qscale_act"] = np.array(0.5, ml_dtypes.bfloat16)
    return tensors


@pytest.mark.parametrize("kernels", KERNELS)
def test_fp8(tmp_path: Path, kernels: str) -> None:
    params = {**PARAMS, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    model = make_model(params)
    folder = write(tmp_path / "m", params, quantized(model, params))
    ids = [int(token) for token in np.random.default_rng(0).integers(0, params["vocab_size"], 40)]
    loaded = load_model(resolve(folder), make(kernels))
    assert [loaded.formats[name] for name in ("layers.1.attention.q", "layers.0.mlp.down", "head")] == [
        "FP8",
        "FP8",
        "F32",
    ]
    assert loaded.checkpoint.quantization == "fp8"
    assert np.abs(Rig(loaded.decoder).run(ids, [7, 1]) - transformers_logits(model, ids)).max() < 2e-4


def test_methods_of_other_libraries_in_their_words(tmp_path: Path) -> None:
    """Newer files of Mistral's layout have compressed-tensors' settings as a config.json has them."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    tensors: dict[str, NDArray[Any]] = {}
    for name, values in random_tensors().items():
        if not name.startswith("layers.") or values.ndim == 1:
            tensors[name] = values
            continue
        tensors[name] = values.astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale"] = np.array([0.5], np.float32)
    folder = write(tmp_path / "m", {**PARAMS, "quantization_config": settings}, tensors)
    loaded = load_model(folder, make("reference"))
    weight: Any = loaded.decoder.parameters["layers.1.mlp.up"]
    wanted = tensors["layers.1.feed_forward.w3.weight"].astype(np.float32) / 2
    np.testing.assert_array_equal(weight.dequantize(), wanted)


@pytest.mark.parametrize(
    ("settings", "changes", "kind", "word"),
    [
        ({"qformat_weight": "nvfp4"}, {}, UnsupportedModel, "qformat_weight to 'nvfp4'"),
        ({"qformat_weight": "fp8_e4m3", "block": 128}, {}, UnsupportedModel, "block"),
        ({"qscheme_act": "TENSOR"}, {}, CorruptCheckpoint, "qformat_weight is missing"),
        ({"qformat_weight": "fp8_e4m3"}, {"qscale_weight": None}, CorruptCheckpoint, "no qscale_weight"),
        (
            {"qformat_weight": "fp8_e4m3"},
            {"qscale_weight": np.ones((3, 5), np.float32)},
            CorruptCheckpoint,
            "does not fit",
        ),
    ],
)
def test_quantization_that_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], kind: type[TramontaneError], word: str, tmp_path: Path
) -> None:
    params = {**PARAMS, "quantization": settings}
    tensors = random_tensors()
    name = "layers.0.attention.wq"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors |= {f"{name}.{ending}": value for ending, value in changes.items() if value is not None}
    with pytest.raises(kind, match=word):
        open_checkpoint(write(tmp_path / "m", params, tensors)).spec()


def test_it_is_a_llama(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="architecture"):
        open_checkpoint(write(tmp_path / "n", PARAMS, random_tensors())).spec("qwen2")
