"""EngineConfig: flat options in, checked and frozen groups out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tramontane.config import ALIASES, CacheConfig, EngineConfig, SchedulerConfig, flag, option_names
from tramontane.errors import InvalidRequest


def test_options_find_their_groups() -> None:
    config = EngineConfig.from_options(
        {"block_size": 32, "max_num_seqs": 4, "dtype": "bfloat16", "cache_dtype": "float32", "threads": 2}
    )
    assert config == EngineConfig(
        cache=CacheConfig(block_size=32, dtype="float32"),
        scheduler=SchedulerConfig(max_num_seqs=4),
        dtype="bfloat16",
        threads=2,
    )


def test_no_options_and_options_of_none_are_the_defaults() -> None:
    assert EngineConfig.from_options({}) == EngineConfig()
    assert EngineConfig.from_options(dict.fromkeys(option_names())) == EngineConfig()


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases_mean_their_option(alias: str, name: str) -> None:
    value: Any = {"prefix_caching": False, "paged_attention": False, "memory_fraction": 0.5}.get(name, 7)
    assert EngineConfig.from_options({alias: value}) == EngineConfig.from_options({name: value}) != EngineConfig()


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_option_is_named(value: object) -> None:
    with pytest.raises(InvalidRequest, match=r"blok_size.*block_size") as caught:
        EngineConfig.from_options({"blok_size": value})
    assert caught.value.field == "blok_size"


def test_one_setting_under_two_names_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig.from_options({"num_blocks": 4, "max_pages": 4})
    assert caught.value.field == "max_pages"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("block_size", 16.0),
        ("block_size", True),
        ("num_blocks", -1),
        ("memory_bytes", "4G"),
        ("memory_fraction", 1.5),
        ("memory_fraction", float("nan")),
        ("prefix_caching", 1),
        ("paged_attention", "no"),
        ("cache_dtype", "int3"),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("device", "tpu"),
        ("device", "cuda:x"),
        ("device", 0),
        ("device_fallback", "yes"),
        ("kernels", "fast"),
        ("threads", 0),
        ("dtype", "float8"),
        ("architecture", 3),
        ("context_length", 1),
        ("deterministic", 1),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig.from_options({name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("group", [CacheConfig, SchedulerConfig, EngineConfig])
def test_only_optional_settings_take_none(group: type) -> None:
    for field in dataclasses.fields(group):
        if field.default is not None and field.default is not dataclasses.MISSING:
            with pytest.raises(InvalidRequest):
                group(**{field.name: None})


def test_the_cache_has_one_size() -> None:
    with pytest.raises(InvalidRequest, match="already set by num_blocks"):
        CacheConfig(num_blocks=4, memory_fraction=0.5)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:12", "metal"])
def test_devices(device: str) -> None:
    assert EngineConfig(device=device).device == device


def test_flags() -> None:
    assert flag("X", {"X": " Yes "})
    assert not flag("X", {"X": "0"})
    assert not flag("X", {})
    with pytest.raises(InvalidRequest, match="neither yes nor no"):
        flag("X", {"X": "maybe"})
