"""Families with states: what their configurations say in other words, and what of them is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.models.cases import CASES
from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.models.families import hf_names, spec_from_hf
from tramontane.models.spec import ConvSpec, ModelSpec, StateSpaceSpec


def config(case: str, **changes: Any) -> Mapping[str, Any]:
    found = CASES[case]
    return {"model_type": found.model_type, **found.settings, **changes}


def spec(case: str, **changes: Any) -> ModelSpec:
    return spec_from_hf(config(case, **changes))


def attending(of: ModelSpec) -> list[bool]:
    return [layer.attention is not None for layer in of.layers]


def test_the_half_that_writes_is_read_out_of_one_that_sees_too() -> None:
    text = config(
        "qwen3-5", rope_parameters={"rope_theta": 500.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    )
    both = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    with pytest.raises(UnsupportedModel, match="architectures"):
        spec_from_hf(both)
    assert spec_from_hf(both, "qwen3_5") == spec_from_hf(text)
    names = hf_names(both, "qwen3_5")
    target = names.target("model.language_model.layers.1.self_attn.q_proj.weight")
    assert target is not None
    assert (target.parts, target.groups) == (("layers.1.attention.q", "layers.1.attention.gate"), 6)
    assert names.target("model.language_model.layers.0.linear_attn.in_proj_z.weight") is not None


def test_which_layers_attend_has_several_spellings() -> None:
    granite = dict(config("granite-hybrid"))
    kinds = ["mamba", "attention", "mamba"]
    assert spec("granite-hybrid", layer_types=kinds) == spec_from_hf(granite)
    assert attending(spec("granite-hybrid", layer_types=None)) == [False] * 3
    assert attending(spec("lfm2", layer_types=None, full_attn_idxs=[2])) == [False, False, True, False]
    assert attending(spec("lfm2", layer_types=None)) == [True] * 4
    assert attending(spec("qwen3-next", layer_types=None, full_attention_interval=2)) == [False, True] * 2
    with pytest.raises(CorruptCheckpoint, match="layer_types"):
        spec("lfm2", layer_types=["conv"])
    with pytest.raises(UnsupportedModel, match="layer_types"):
        spec("lfm2", layer_types=["conv", "spiral", "conv", "conv"])


def test_sizes_follow_from_other_keys() -> None:
    renamed = {key: value for key, value in config("lfm2").items() if key != "intermediate_size"}
    assert spec_from_hf({**renamed, "block_ff_dim": 80, "tie_embedding": True}) == spec("lfm2")
    state = spec("granite-hybrid", mamba_d_head="auto").layers[0].state
    assert isinstance(state, StateSpaceSpec)
    assert state.head_dim == 12
    conv = spec("lfm2").layers[0].state
    assert conv == ConvSpec(48, 3)


@pytest.mark.parametrize(
    ("bounds", "read"),
    [
        ([0.0, {"__float__": "Infinity"}], (0.0, float("inf"))),
        ([0.1, "inf"], (0.1, float("inf"))),
        (None, (0.0, float("inf"))),
    ],
)
def test_steps_may_be_unbounded(bounds: Any, read: tuple[float, float]) -> None:
    state = spec("mamba2", time_step_limit=bounds).layers[0].state
    assert isinstance(state, StateSpaceSpec)
    assert state.step_limit == read


@pytest.mark.parametrize(
    ("case", "changes", "key"),
    [
        ("mamba2", {"time_step_limit": [1.0, 0.5]}, "time_step_limit"),
        ("mamba2", {"time_step_limit": [0.0, "wide"]}, "time_step_limit"),
        ("mamba2", {"time_step_limit": 3}, "time_step_limit"),
        ("mamba2", {"n_groups": 3}, "n_groups"),
        ("mamba2", {"head_dim": 10}, "n_groups"),
        ("mamba2", {"conv_kernel": 1}, "conv_kernel"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act"),
        ("granite-hybrid", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("lfm2", {"layer_types": None, "full_attn_idxs": 2}, "full_attn_idxs"),
        ("qwen3-next", {"linear_num_value_heads": 5}, "linear_num_value_heads"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(case: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises((CorruptCheckpoint, UnsupportedModel), match=key):
        spec(case, **changes)
