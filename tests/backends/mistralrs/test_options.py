"""Options of mistral.rs: names, environment, devices, and the refusal of what this wheel has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.mistralrs.fake import Wheel
from tramontane.backends.mistralrs import options as options_module
from tramontane.backends.mistralrs.options import ISQ_NAMES, built_for, isq_name, resolve_device, settle
from tramontane.backends.mistralrs.source import find, runner_arguments
from tramontane.errors import DeviceNotAvailable, InvalidRequest, ModelNotFound


@pytest.mark.parametrize(
    ("given", "name"), [("Q4_K", "Q4K"), ("q4k", "Q4K"), ("Q8_0", "Q8_0"), ("q80", "Q8_0"), (4, "Q4K"), ("8", "Q8_0")]
)
def test_quantizations_by_any_of_their_names(given: str | int, name: str) -> None:
    assert isq_name(given) == name


def test_every_quantization_is_itself() -> None:
    assert [isq_name(name) for name in ISQ_NAMES] == list(ISQ_NAMES)
    assert isq_name(4, "metal") == "AFQ4"
    for wrong in ("Q9", 7, "awq"):
        with pytest.raises(InvalidRequest, match="quantization"):
            isq_name(wrong)


@pytest.mark.parametrize(
    ("variable", "value", "option", "wanted"),
    [
        ("MISTRALRS_ISQ", "Q4K", "quantization", "Q4K"),
        ("MISTRALRS_PAGED_ATTN", "false", "paged_attention", False),
        ("MISTRALRS_PREFIX_CACHE_N", "3", "prefix_cache_n", 3),
        ("MISTRALRS_PREFIX_CACHE_N", "false", "prefix_cache_n", 0),
        ("MISTRALRS_NO_STREAM", "1", "stream", False),
        ("MISTRALRS_NO_STREAM", "0", "stream", True),
        ("MISTRALRS_PAGED_ATTN_BLOCK_SIZE", "", "block_size", None),
        ("MISTRALRS_DEVICE", "CPU", "device", "cpu"),
        ("MISTRALRS_DEVICE", "auto", "device", "auto"),
    ],
)
def test_the_environment_sets_what_is_not_given(variable: str, value: str, option: str, wanted: Any) -> None:
    assert getattr(settle({}, {variable: value}).options, option) == wanted


@pytest.mark.parametrize(("has", "paged", "size"), [("cpu", False, None), ("cuda", True, 32), ("metal", True, 32)])
def test_paged_attention_is_where_the_wheel_has_it(
    has: str, paged: bool, size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "built_for", lambda: has)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))

    def told(**environ: str) -> dict[str, Any]:
        settings = settle({}, environ)
        return runner_arguments(Wheel, find(tmp_path / "m.gguf", settings.options), settings, tmp_path, tmp_path)

    usual = told()
    assert (settle({}, {}).paged, usual.get("pa_blk_size")) == (paged, size)
    if has == "cpu":
        assert "no_paged_attn" not in usual
        return
    assert not usual["no_paged_attn"]
    assert told(MISTRALRS_PAGED_ATTN_BLOCK_SIZE="16")["pa_blk_size"] == 16
    off = told(MISTRALRS_PAGED_ATTN="false")
    assert (off["no_paged_attn"], "pa_blk_size" in off) == (True, False)
    assert told(MISTRALRS_PAGED_ATTN="true")["paged_attn"]


def test_options_go_before_the_environment() -> None:
    settings = settle({"isq": "Q8_0", "prefix_cache_n": 2}, {"MISTRALRS_ISQ": "Q4K", "MISTRALRS_PREFIX_CACHE_N": "9"})
    assert (settings.isq, settings.prefix_cache_n, settings.environment) == ("Q8_0", 2, frozenset())


def test_documented_defaults() -> None:
    settings = settle({}, {"MISTRALRS_ISQ": ""})
    assert (settings.isq, settings.paged, settings.prefix_cache_n) == (None, False, 16)
    assert (settings.options.stream, settings.options.device, settings.options.paged_attention) == (True, "auto", None)
    assert settle({"prefix_caching": False}, {}).prefix_cache_n == 0


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"MISTRALRS_PAGED_ATTN": "perhaps"}, "MISTRALRS_PAGED_ATTN"),
        ({"MISTRALRS_PREFIX_CACHE_N": "-1"}, "MISTRALRS_PREFIX_CACHE_N"),
        ({"MISTRALRS_PAGED_ATTN_BLOCK_SIZE": "large"}, "MISTRALRS_PAGED_ATTN_BLOCK_SIZE"),
        ({"MISTRALRS_PAGED_ATTN_BLOCK_SIZE": "32"}, "block_size"),
        ({"MISTRALRS_NO_STREAM": "2"}, "MISTRALRS_NO_STREAM"),
        ({"MISTRALRS_DEVICE": "abacus"}, "device"),
        ({"MISTRALRS_ISQ": "Q9"}, "quantization"),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settle({}, environ)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"paged_attention": True}, "paged_attention"),
        ({"block_size": 32}, "block_size"),
        ({"memory_goal": "4GiB"}, "memory_goal"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"kv_cache": 1}, "kv_cache"),
        ({"dtype": "int8"}, "dtype"),
        ({"kind": "speech"}, "kind"),
        ({"isq": "Q4K", "quantization": "Q8_0"}, "quantization"),
        ({"xlora": "."}, "xlora"),
        ({"tgt_non_granular_index": 1}, "tgt_non_granular_index"),
        ({"xlora": ".", "xlora_order": ".", "adapters": {}}, "adapters"),
        ({"adapters": "a"}, "adapters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settle(options, {})
    assert caught.value.field == field


def test_paged_attention_says_what_it_needs() -> None:
    with pytest.raises(InvalidRequest, match="CUDA and Metal"):
        settle({"paged_attention": True}, {})
    with pytest.raises(InvalidRequest, match="CUDA and Metal"):
        settle({}, {"MISTRALRS_PAGED_ATTN": "true"})


@pytest.mark.parametrize("name", ["topology", "imatrix", "calibration_file", "tokenizer", "mmproj"])
def test_files_must_be_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=name):
        settle({name: str(tmp_path / "nothing")}, {})
    (tmp_path / "there").touch()
    assert getattr(settle({name: str(tmp_path / "there")}, {}).options, name) == tmp_path / "there"


@pytest.mark.parametrize(
    ("versions", "device"),
    [
        ({"mistralrs": "0.9.5"}, "cpu"),
        ({"mistralrs-cuda": "0.9.5"}, "cuda"),
        ({"mistralrs": "0.9.5+cu126"}, "cuda"),
        ({"mistralrs-metal": "0.9.5"}, "metal"),
    ],
)
def test_what_the_wheel_is_built_for(versions: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_version", lambda name: versions.get(name, ""))
    assert built_for() == device


@pytest.mark.parametrize(
    ("asked", "has", "platform", "device"),
    [
        ("auto", "cpu", "linux", "cpu"),
        ("auto", "cuda", "linux", "cuda"),
        ("auto", "cuda", "win32", "cpu"),
        ("cuda", "cuda", "linux", "cuda"),
        ("cuda:0", "cuda", "linux", "cuda"),
        ("metal", "metal", "darwin", "metal"),
        ("cpu", "cpu", "win32", "cpu"),
    ],
)
def test_devices(asked: str, has: str, platform: str, device: str) -> None:
    assert resolve_device(asked, has=has, platform=platform) == device


@pytest.mark.parametrize(
    ("asked", "has", "platform", "says"),
    [
        ("cuda", "cpu", "linux", "built for cpu"),
        ("cuda", "cuda", "win32", "WSL2"),
        ("cuda:1", "cuda", "linux", "CUDA_VISIBLE_DEVICES=1"),
        ("cpu", "cuda", "linux", "wheel for CPUs"),
        ("metal", "cpu", "darwin", "wheel for metal"),
    ],
)
def test_a_device_that_the_wheel_has_not(asked: str, has: str, platform: str, says: str) -> None:
    with pytest.raises(DeviceNotAvailable, match=says):
        resolve_device(asked, has=has, platform=platform)
    assert resolve_device(asked, True, has=has, platform=platform) == ("cpu" if platform == "win32" else has)
