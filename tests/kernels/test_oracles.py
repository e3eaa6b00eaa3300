"""The oracles are what other projects compute: transformers' Llama parts and warpers, torch's attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels import oracles

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def test_rms_norm_is_llamas() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = normal(5, 48), normal(48)
    norm = LlamaRMSNorm(48, eps=1e-5)
    norm.weight.data = torch.from_numpy(weight)
    theirs = norm(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(oracles.rms_norm(x, weight, 1e-5), theirs, atol=2e-6)


@pytest.mark.parametrize("repeat", [1, 3])
def test_layer_norm_is_torchs(repeat: int) -> None:
    x, weight, bias = normal(6, 48), normal(repeat, 48), normal(repeat, 48) + 1
    rows = torch.from_numpy(x).view(-1, repeat, 48)
    plain = torch.nn.functional.layer_norm(rows, (48,), eps=1e-5)
    theirs = (plain * torch.from_numpy(weight) + torch.from_numpy(bias)).reshape(6, 48).numpy()
    np.testing.assert_allclose(oracles.layer_norm(x, weight, bias, 1e-5), theirs, atol=2e-6)
    np.testing.assert_allclose(oracles.layer_norm(x, None, None, 1e-5), plain.reshape(6, 48).numpy(), atol=2e-6)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_is_llamas(theta: float) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions, x = np.array([0, 1, 17, 4095], np.int32), normal(4, 4, 16)
    rotary = LlamaRotaryEmbedding(config)
    heads_first = torch.from_numpy(x).transpose(0, 1)[None]
    cos, sin = rotary(heads_first, torch.from_numpy(positions)[None].long())
    turned, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    ours = oracles.rope(x, positions, rotary.inv_freq.numpy(), interleaved=False)
    np.testing.assert_allclose(ours, turned[0].transpose(0, 1).numpy(), atol=2e-6)


def test_interleaved_rope_is_a_product_of_complex_numbers() -> None:
    x, positions, inv_freq = normal(3, 2, 8), np.array([0, 5, 900], np.int32), normal(4)
    angles = torch.from_numpy(positions).float()[:, None] * torch.from_numpy(inv_freq)
    pairs = torch.view_as_complex(torch.from_numpy(x).reshape(3, 2, 4, 2))
    theirs = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2).numpy()
    np.testing.assert_allclose(oracles.rope(x, positions, inv_freq, interleaved=True), theirs, atol=2e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_attention_is_torchs(window: int) -> None:
    q, k, v = normal(4, 6, 8), normal(11, 2, 8), normal(11, 2, 8)[::-1].copy()
    ahead = np.arange(7, 11)[:, None] - np.arange(11)
    mask = torch.from_numpy((ahead >= 0) & (ahead < (window or 99)))
    heads_first = [torch.from_numpy(a).transpose(0, 1)[None] for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3, enable_gqa=True)
    ours = oracles.attention(q, k, v, 0.3, window)
    np.testing.assert_allclose(ours, theirs[0].transpose(0, 1).numpy(), atol=2e-6)


def test_bidirectional_attention_is_torchs() -> None:
    q, k, v = normal(9, 6, 8), normal(9, 2, 8), normal(9, 2, 12)
    heads_first = [torch.from_numpy(a).transpose(0, 1)[None] for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=0.3, enable_gqa=True)
    ours = oracles.attention(q, k, v, 0.3, causal=False)
    np.testing.assert_allclose(ours, theirs[0].transpose(0, 1).numpy(), atol=2e-6)


def _eager(module: str, q: Any, k: Any, v: Any, softcap: float | None = None, sinks: Any = None) -> Any:
    """Causal attention of whole sequences by a transformers model's own function."""
    import importlib
    from types import SimpleNamespace

    eager = importlib.import_module(f"transformers.models.{module}.modeling_{module}").eager_attention_forward
    layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sinks, head_dim=8)
    heads_first = [torch.from_numpy(a).transpose(0, 1)[None] for a in (q, k, v)]
    mask = torch.full((1, 1, len(q), len(q)), -torch.inf).triu(1)
    more = {} if softcap is None else {"softcap": softcap}
    return eager(layer, *heads_first, mask, scaling=0.3, dropout=0.0, **more)[0][0].numpy()


def test_softcapped_attention_is_gemma2s() -> None:
    q, k, v = normal(9, 6, 8) * 4, normal(9, 2, 8), normal(9, 2, 8)[::-1].copy()
    ours = oracles.attention(q, k, v, 0.3, softcap=1.5)
    np.testing.assert_allclose(ours, _eager("gemma2", q, k, v, softcap=1.5), atol=2e-6)


def test_attention_with_sinks_is_gpt_osss() -> None:
    q, k, v, sinks = normal(9, 6, 8), normal(9, 2, 8), normal(9, 2, 8)[::-1].copy(), normal(6)
    theirs = _eager("gpt_oss", q, k, v, sinks=torch.from_numpy(sinks))
    np.testing.assert_allclose(oracles.attention(q, k, v, 0.3, sinks=sinks), theirs, atol=2e-6)


def test_slopes_are_blooms() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    q, k, v = normal(9, 4, 8), normal(9, 4, 8), normal(9, 4, 8)[::-1].copy()
    alibi = build_alibi_tensor(torch.ones(1, 9), 4, torch.float32).view(1, 4, 1, 9)
    mask = alibi + torch.full((9, 9), -torch.inf).triu(1)
    heads_first = [torch.from_numpy(a).transpose(0, 1)[None] for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3)
    slopes = alibi[0, :, 0, 1].numpy()
    ours = oracles.attention(q, k, v, 0.3, slopes=slopes)
    np.testing.assert_allclose(ours, theirs[0].transpose(0, 1).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu")),
        *(("gelu_quick", "quick_gelu"), ("relu_squared", "relu2"), ("sigmoid", "sigmoid")),
    ],
)
def test_activations_are_transformers(kind: str, name: str) -> None:
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 997, dtype=np.float32)
    np.testing.assert_allclose(oracles.activation(x, kind), ACT2FN[name](torch.from_numpy(x)).numpy(), atol=2e-6)


def test_the_clamped_gate_is_gpt_osss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1)
    gate, up = normal(40, 8) * 6, normal(40, 8)[::-1].copy() * 6
    joint = torch.from_numpy(np.stack((gate, up), axis=-1).reshape(40, 16))
    theirs = GptOssExperts(config)._apply_gate(joint).numpy()
    np.testing.assert_allclose(oracles.gated_activation(gate, up, "swiglu_clamped", 7.0), theirs, atol=2e-5)


def test_log_softmax_is_torchs() -> None:
    x = normal(3, 101) * 10
    np.testing.assert_allclose(oracles.log_softmax(x), torch.from_numpy(x).log_softmax(-1).numpy(), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("typical_p", [0.1, 0.7, 1.0])
def test_cuts_are_transformers_warpers(
    temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    from transformers.generation import logits_process as warpers

    logits = normal(40) * 3
    logits[7] = -np.inf
    if top_k == 5 and top_p == 1:  # ties at the edge are kept; in top-p, which one of a tie goes is the sort's choice
        logits[3] = logits[21] = np.sort(logits)[-5]
    scores = torch.from_numpy(logits)[None]
    chain = [warpers.TemperatureLogitsWarper(temperature)]
    chain += [warpers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [warpers.TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    chain += [warpers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [warpers.MinPLogitsWarper(min_p)] if min_p else []
    for warper in chain:
        scores = warper(None, scores)
    ours = oracles.probabilities(logits, temperature, top_k, top_p, min_p, typical_p)
    theirs = scores[0].double().softmax(-1).numpy()
    assert np.array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
