"""Quantized checkpoints that lie, or ask for what this build lacks: refused by name, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.kernels.modules import make
from tests.loading.quantized.cases import CASES, tensors_of, write_case
from tramontane.errors import CorruptCheckpoint, TramontaneError, UnsupportedModel
from tramontane.loading.build import checked_plan, load_model
from tramontane.loading.checkpoint import open_checkpoint

OPS = make("reference")
MODULE = "model.layers.0.mlp.up_proj"  # 128 x 64


def i32(*shape: int) -> Any:
    return np.zeros(shape, np.int32)


WRONG = {
    "no scales": ("gptq-4", {"scales": None}, "it has no scales"),
    "no zeros": ("gptq-4", {"qzeros": None}, "it has no qzeros"),
    "zeros of another shape": ("gptq-4", {"qzeros": i32(3, 16)}, "qzeros has shape"),
    "zeros of another width": ("gptq-4", {"qzeros": i32(2, 9)}, "no packing"),
    "zeros that mean other bits": ("gptq-4", {"qzeros": i32(2, 32)}, "no packing of 4 bits"),
    "codes of other outputs": ("gptq-4", {"qweight": i32(8, 64)}, "qweight has shape"),
    "codes that are floats": ("gptq-4", {"qweight": np.zeros((8, 128), np.float32)}, "qweight is F32"),
    "empty codes": ("gptq-4", {"qweight": i32(0, 128)}, "qweight is empty"),
    "a group too high": ("gptq-4-act-order", {"g_idx": np.full(64, 2, np.int32)}, "g_idx names groups 2 to 2"),
    "a negative group": ("gptq-4-act-order", {"g_idx": np.full(64, -1, np.int32)}, "g_idx names groups"),
    "too few groups named": ("gptq-4-act-order", {"g_idx": i32(40)}, "g_idx has shape"),
    "groups that do not divide": ("awq", {"qzeros": i32(3, 16), "scales": np.ones((3, 128), np.float16)}, "3 groups"),
    "awq scales": ("awq", {"scales": np.ones((2, 64), np.float16)}, "scales has shape"),
    "a shape of other rows": ("packed-4", {"weight_shape": np.array([64, 64])}, "weight_packed has shape"),
    "a shape of other columns": ("packed-4", {"weight_shape": np.array([128, 4096])}, "words for 4096 inputs"),
    "a negative shape": ("packed-4", {"weight_shape": np.array([128, -64])}, "weight_shape says"),
    "a shape that is no pair": ("packed-4", {"weight_shape": np.array([128])}, "weight_shape has shape"),
    "packed zeros": ("packed-4-zeros", {"weight_zero_point": i32(17, 2)}, "weight_zero_point has shape"),
    "scales of no grid": ("fp8-blocks", {"weight_scale_inv": np.ones((5, 7), np.float32)}, "does not fit a weight"),
    "no global scale": ("nvfp4", {"weight_global_scale": None}, "no weight_global_scale"),
    "rows of int8": ("bnb-int8", {"SCB": np.ones(64, np.float32)}, "SCB has shape"),
    "4 bits, too few": ("bnb-nf4", {"weight": np.zeros((9, 1), np.uint8)}, "weight takes 9 bytes"),
    "4 bits, too few scales": ("bnb-nf4", {"weight.absmax": np.ones(3, np.float32)}, "absmax has shape"),
    "no state": ("bnb-nf4", {"weight.quant_state.bitsandbytes__nf4": None}, "no quant_state"),
    "a state that is no JSON": (
        "bnb-nf4",
        {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"[" * 5000, np.uint8)},
        "not JSON",
    ),
    "a state of a huge shape": (
        "bnb-nf4",
        {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"blocksize": 64, "shape": [2e9, 7]}', np.uint8)},
        "not that of a matrix",
    ),
    "hqq words": ("hqq-4-axis1", {"W_q": np.zeros((3, 3), np.uint8)}, "W_q takes 9 bytes"),
    "hqq bits": ("hqq-4-axis1", {"nbits": np.array(5, np.int32)}, "codes of 5 bits"),
    "hqq axis": ("hqq-4-axis1", {"axis": np.array(7, np.int32)}, "codes of 4 bits in groups"),
    "hqq groups": ("hqq-4-axis1", {"group_size": np.array(0, np.int32)}, "in groups of 0"),
    "hqq scales": ("hqq-4-axis1", {"scale": np.ones((3, 1), np.float16)}, "scale has shape"),
    "hqq shape": ("hqq-4-axis1", {"shape": np.array([1 << 40, 64])}, "shape says"),
    "mlx words": ("mlx-4", {"weight": np.zeros((128, 9), np.uint32)}, "has 9 words a row"),
    "mlx biases": ("mlx-4", {"biases": None}, "it has no biases"),
    "experts' blocks": ("gpt-oss", {"blocks": np.zeros((128, 3, 16), np.uint8)}, "scales has shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_modules_that_do_not_fit_are_corrupt(what: str, tmp_path: Path) -> None:
    name, changes, message = WRONG[what]
    write_case(tmp_path / "m", CASES[name], **{f"{MODULE}.{ending}": change for ending, change in changes.items()})
    with pytest.raises(CorruptCheckpoint, match=rf"(?s)up_proj.*{message}"):
        open_checkpoint(tmp_path / "m")


def settings(folder: Path, case: str, **changes: Any) -> Path:
    """A checkpoint whose settings are changed."""
    write_case(folder, CASES[case])
    config = json.loads((folder / "config.json").read_text())
    config[CASES[case].key].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LACKING = {
    "another method": ("gptq-4", {"quant_method": "aqlm"}, "quantized with 'aqlm'.*GGUF"),
    "five bits": ("gptq-4", {"bits": 5}, "bits to 5.*2, 3, 4, 8"),
    "marlin": ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format to 'marlin'.*gptq_v2"),
    "gemv": ("awq", {"version": "gemv"}, "version to 'gemv'.*gemm"),
    "awq of 8 bits": ("awq", {"bits": 8}, "bits to 8"),
    "sparse": ("packed-4", {"format": "marlin-24"}, "format to 'marlin-24'"),
    "sparsity": ("packed-4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    "transforms": ("packed-4", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "another float": ("fp8-blocks", {"fmt": "e3m4"}, "fmt to 'e3m4'"),
    "another mlx mode": ("mlx-4", {"mode": "lut"}, "mode to 'lut'"),
    "another 4-bit type": ("bnb-nf4", {"bnb_4bit_quant_type": "af4"}, "'af4'.*nf4 and fp4"),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_this_build_lacks_is_named_with_a_remedy(what: str, tmp_path: Path) -> None:
    case, changes, message = LACKING[what]
    checkpoint = open_checkpoint(settings(tmp_path / "m", case, **changes))
    assert checkpoint.tensors  # what the files hold can still be listed
    with pytest.raises(UnsupportedModel, match=f"(?s){message}"):
        checked_plan(checkpoint)
    with pytest.raises(UnsupportedModel):
        load_model(tmp_path / "m", OPS)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gptq-4", {"bits": "four"}, "bits is 'four'"),
        ("gptq-4", {"bits": None}, "bits is missing"),
        ("gptq-4", {"quant_method": 7}, "quant_method is 7"),
        ("packed-4", {"config_groups": {"a": 3}}, "config_groups"),
        ("packed-4", {"config_groups": {"a": {"weights": [1]}}}, "weights is"),
        ("fp8-blocks", {"weight_block_size": [128]}, "weight_block_size"),
        ("fp8-blocks", {"weight_block_size": [0, -1]}, "weight_block_size"),
    ],
)
def test_settings_of_the_wrong_kind_are_corrupt(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptCheckpoint, match=message):
        open_checkpoint(settings(tmp_path / "m", case, **changes))


def test_stacked_experts_need_scales_of_their_shape(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = np.zeros((4, 8, 2, 16), np.uint8), np.zeros((4, 8, 3), np.uint8)
    write_case(tmp_path / "m", CASES["gpt-oss"], **{f"{name}_blocks": blocks, f"{name}_scales": scales})
    with pytest.raises(CorruptCheckpoint, match="scales has shape"):
        open_checkpoint(tmp_path / "m")
    write_case(tmp_path / "n", CASES["gpt-oss"], **{f"{name}_blocks": blocks, f"{name}_scales": scales[..., :2]})
    with pytest.raises(UnsupportedModel, match="does not know"):  # the case is a llama
        checked_plan(open_checkpoint(tmp_path / "n"))


def test_groups_of_unequal_sizes_are_refused(tmp_path: Path) -> None:
    g_idx = np.repeat([0, 1], [30, 34]).astype(np.int32)
    write_case(tmp_path / "m", CASES["gptq-4"], **{f"{MODULE}.g_idx": g_idx})
    with pytest.raises(UnsupportedModel, match="unequal sizes"):
        checked_plan(open_checkpoint(tmp_path / "m"))


def test_a_module_is_plain_or_quantized_not_both(tmp_path: Path) -> None:
    write_case(tmp_path / "m", CASES["gptq-4"], **{f"{MODULE}.weight": np.zeros((128, 64), np.float32)})
    with pytest.raises(CorruptCheckpoint, match="quantized tensors and a plain weight"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "name", ["gptq-3-act-order", "packed-4-zeros", "bnb-nf4-nested", "hqq-3-axis0", "nvfp4", "awq"]
)
def test_any_damage_ends_in_a_typed_error_or_a_model(name: str, tmp_path: Path) -> None:
    """Tensors of one module swapped for others of odd shapes, types and values, with a fixed seed."""
    rng = np.random.default_rng(5)
    write_case(tmp_path / "m", CASES[name])
    file = tmp_path / "m" / "model.safetensors"
    sound, _ = tensors_of(CASES[name])
    own = sorted(tensor for tensor in sound if tensor.startswith(MODULE))
    refused = 0
    for _ in range(60):
        tensors = dict(sound)
        for tensor in rng.choice(own, rng.integers(1, 3), replace=False):
            shape = tuple(int(size) for size in rng.choice([0, 1, 2, 3, 8, 16, 64, 128], rng.integers(0, 4)))
            dtype = rng.choice([np.int32, np.uint8, np.float16, np.float32, np.int64])
            if rng.random() < 0.4:  # the right shape with wild values
                shape, dtype = sound[tensor].shape, sound[tensor].dtype
            tensors[tensor] = (
                rng.integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, dtype=np.uint8)
                .view(dtype)
                .reshape(shape)
            )
        save_file(tensors, file)
        try:
            loaded = load_model(tmp_path / "m", OPS)
            loaded.decoder.parameters["layers.0.mlp.up"].dequantize()  # type: ignore[union-attr]
        except TramontaneError:
            refused += 1
    assert refused > 20
