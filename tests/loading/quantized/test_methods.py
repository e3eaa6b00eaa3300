"""Every quantization method: checkpoints written from its description give exactly the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.kernels.modules import make
from tests.loading.checkpoints import write_folder
from tests.loading.quantized import writers
from tests.loading.quantized.cases import CASES, LLAMA, write_case
from tests.models.harness import Rig
from tramontane.errors import UnsupportedModel
from tramontane.kernels import Ops
from tramontane.loading.build import load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.weights import CodedWeight

OPS = make("reference")
IDS = [1, 7, 90, 33, 2, 64]


@pytest.fixture(params=["reference", "cpu", "torch"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.mark.parametrize("name", CASES)
def test_values_are_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    plain = write_case(tmp_path / "m", case)
    loaded = load_model(tmp_path / "m", OPS)
    quantized = 0
    for canonical, binding in loaded.bindings.items():
        tensor = binding.tensor
        parameter: Any = loaded.decoder.parameters[canonical]
        values = parameter.dequantize() if plain[tensor].ndim == 2 else parameter
        np.testing.assert_array_equal(values, plain[tensor], err_msg=tensor)
        if plain[tensor].ndim == 2 and (case.every or ".layers." in tensor):
            quantized += 1
            assert isinstance(parameter, CodedWeight)
            assert loaded.formats[canonical] == parameter.format == case.format
            assert loaded.checkpoint.tensors[tensor].nbytes == parameter.nbytes
            assert parameter.nbytes < 0.75 * plain[tensor].nbytes + 1400  # the tables of small matrices weigh
    assert quantized == (9 if case.every else 7)
    assert loaded.checkpoint.quantization


SOME = ["gptq-3-act-order", "awq", "packed-4-zeros", "fp8-ragged-blocks", "nvfp4", "bnb-int8", "hqq-4-axis0", "mlx-6"]


@pytest.mark.parametrize("name", SOME)
def test_logits_are_those_of_the_values(name: str, ops: Ops, tmp_path: Path) -> None:
    plain = write_case(tmp_path / "m", CASES[name])
    twin = write_folder(tmp_path / "twin", plain, **LLAMA)
    logits = Rig(load_model(tmp_path / "m", ops).decoder).run(IDS, chunks=(4, 1))
    expected = Rig(load_model(twin, OPS).decoder).run(IDS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_what_is_packed_alike_stays_where_it_is_mapped(tmp_path: Path) -> None:
    for name in ("packed-4", "fp8-blocks", "mlx-3", "gpt-oss", "int8"):
        write_case(tmp_path / name, CASES[name])
        loaded = load_model(tmp_path / name, OPS)
        codes = loaded.decoder.parameters["layers.0.mlp.up"].tensors()["codes"]
        assert not codes.flags.writeable, name


def test_biases_of_zeros_are_forgotten_and_others_are_not(tmp_path: Path) -> None:
    case = CASES["gptq-4"]
    name = "model.layers.0.mlp.up_proj.bias"
    write_case(tmp_path / "zeros", case, **{name: np.zeros(128, np.float16)})
    assert "layers.0.mlp.up.bias" not in load_model(tmp_path / "zeros", OPS).decoder.parameters
    write_case(tmp_path / "ones", case, **{name: np.ones(128, np.float16)})
    with pytest.raises(UnsupportedModel, match=r"mlp\.up\.bias is not part of the model"):
        load_model(tmp_path / "ones", OPS)


def test_modules_that_were_not_converted_stay_plain(tmp_path: Path) -> None:
    plain = write_case(tmp_path / "m", CASES["gptq-4"])
    loaded = load_model(tmp_path / "m", OPS)
    assert (loaded.formats["head"], loaded.formats["embedding"]) == ("F32", "F32")
    # A single module may be left plain among quantized ones.
    module = "model.layers.0.self_attn.o_proj"
    changes = {f"{module}.{ending}": None for ending in ("qweight", "qzeros", "scales", "g_idx")}
    plain_o = plain[f"{module}.weight"].astype(np.float16)
    write_case(tmp_path / "o", CASES["gptq-4"], **changes, **{f"{module}.weight": plain_o})
    assert load_model(tmp_path / "o", OPS).formats["layers.0.attention.o"] == "F16"


def test_settings_of_gptq_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    write_case(tmp_path / "m", CASES["gptq-3"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    own = config.pop("quantization_config")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="qweight"):
        load_model(tmp_path / "m", OPS)
    del own["quant_method"]
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(own))
    assert load_model(tmp_path / "m", OPS).formats["layers.0.mlp.up"] == "INT3"


def test_a_tied_head_may_be_stored_again(tmp_path: Path) -> None:
    write_case(tmp_path / "m", CASES["mlx-4"])
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UnsupportedModel, match="tie_word_embeddings"):
        load_model(tmp_path / "m", OPS)
    for ending in ("weight", "scales", "biases"):
        tensors[f"lm_head.{ending}"] = tensors[f"model.embed_tokens.{ending}"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert "head" not in load_model(tmp_path / "m", OPS).decoder.parameters


def test_mlx_modules_may_have_settings_of_their_own(tmp_path: Path) -> None:
    write_case(tmp_path / "m", CASES["mlx-4"])
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    written, values = writers.mlx(np.random.default_rng(1), 96, 64, bits=6, group=64)
    tensors.update({f"lm_head.{ending}": array for ending, array in written.items()})
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization"]["lm_head"] = {"bits": 6, "group_size": 64}
    config["quantization_config"] = config["quantization"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path / "m", OPS)
    head: Any = loaded.decoder.parameters["head"]
    assert loaded.formats["head"] == "INT6"
    np.testing.assert_array_equal(head.dequantize(), values)


def test_a_checkpoint_tells_its_matrices(tmp_path: Path) -> None:
    write_case(tmp_path / "m", CASES["gptq-4"])
    checkpoint = open_checkpoint(tmp_path / "m")
    entry = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    assert (entry.shape, entry.format) == ((64, 128), "INT4")
    assert not any(name.endswith(("qweight", "qzeros", "g_idx")) for name in checkpoint.tensors)
    assert checkpoint.quantization == "gptq, 4 bits"
    with pytest.raises(KeyError):
        checkpoint.array("model.layers.0.mlp.down_proj.weight")
