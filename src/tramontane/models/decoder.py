"""The one decoder: what a ModelSpec describes, computed.

Owns the order of its layers. Must not know: families, files, requests, how weights are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tramontane.errors import UnsupportedModel
from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers import rope
from tramontane.layers.attention import Attention, HeadNorm, PlainAttention, Scores
from tramontane.layers.context import BatchContext
from tramontane.layers.embedding import Embedding
from tramontane.layers.kvcache import KVCache
from tramontane.layers.latent import LatentAttention
from tramontane.layers.linear import Linear
from tramontane.layers.mlp import MLP
from tramontane.layers.moe import ExpertLinear, MoE, Router
from tramontane.layers.norm import Norm
from tramontane.layers.rope import LengthRotary, Rotary
from tramontane.layers.state import Conv, Decay, DeltaRule, GatedConv, Mixer, StateSpace
from tramontane.models.parameters import Parameter, check_parameters
from tramontane.models.spec import (
    AttentionSpec,
    ConvSpec,
    KeptSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    StateSpaceSpec,
    StateSpec,
    cache_groups,
    state_shapes,
)
from tramontane.records import dataclass


@dataclass(frozen=True)
class _Branch:
    """A part of a layer between its norms: what stands before it, behind it, and behind its sum with the residual."""

    before: Norm | None
    behind: Norm | None
    behind_sum: Norm | None


_NO_NORMS = _Branch(None, None, None)


@dataclass(frozen=True)
class _Layer:
    attention: Attention | None
    state: Mixer | None
    mlp: MLP | MoE | None
    attention_norms: _Branch
    """Around attention, or the mixer in its place."""
    mlp_norms: _Branch
    parallel: bool
    residual_scale: float
    group: int | None
    """Which cache group it is in; None without attention."""


class _Parameters:
    """A model's parameters below a name, as the layers that they make up."""

    def __init__(self, ops: Ops, parameters: Mapping[str, Parameter], prefix: str = "") -> None:
        self.ops = ops
        self.parameters = parameters
        self.prefix = prefix

    def below(self, name: str) -> _Parameters:
        return _Parameters(self.ops, self.parameters, f"{self.prefix}{name}.")

    def get(self, name: str) -> Parameter | None:
        return self.parameters.get(self.prefix + name)

    def __getitem__(self, name: str) -> Parameter:
        return self.parameters[self.prefix + name]

    def linear(self, name: str) -> Linear:
        return Linear(self[name], self.get(f"{name}.bias"))

    def norm(self, name: str, spec: NormSpec, width: int | None = None) -> Norm:
        """`width`: of the rows that the norm sees, where it has a weight for each of several rows."""
        arrays = [self.get(name), self.get(f"{name}.bias")]
        if width is not None:
            arrays = [a if a is None else self.ops.view(a, (a.shape[0] // width, width)) for a in arrays]
        return Norm(self.ops, spec.kind, spec.eps, *arrays)

    def mlp(self, spec: MLPSpec) -> MLP:
        gate = self.linear("gate") if spec.gated else None
        return MLP(self.ops, gate, self.linear("up"), self.linear("down"), spec.activation, spec.limit)

    def experts(self, name: str) -> ExpertLinear:
        return ExpertLinear(self[name], self.get(f"{name}.bias"))

    def moe(self, spec: MoESpec) -> MoE:
        router, expert = spec.router, spec.expert
        return MoE(
            self.ops,
            Router(
                linear=self.linear("router"),
                top_k=spec.top_k,
                score=router.score,
                normalize=router.normalize,
                scale=router.scale,
                correction=self.get("router.correction"),
                groups=router.groups,
                top_groups=router.top_groups,
                group_score=router.group_score,
                jitter=router.jitter,
            ),
            self.experts("experts.gate") if expert.gated else None,
            self.experts("experts.up"),
            self.experts("experts.down"),
            expert.activation,
            expert.limit,
            shared=self.below("shared").mlp(spec.shared) if spec.shared is not None else None,
            shared_gate=self.linear("shared_gate") if spec.shared_gate else None,
        )

    def attention(self, spec: AttentionSpec, rotary: Rotary | None, context_length: int) -> Attention:
        if spec.latent is not None and rotary is not None:
            return self._latent_attention(spec, rotary)
        return PlainAttention(
            self.ops,
            q=self.linear("q"),
            k=self.linear("k"),
            v=self.linear("v"),
            o=self.linear("o"),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.value_size,
            rotary=rotary,
            scores=self._scores(spec),
            head_norm=self._head_norm(spec),
            clip=spec.clip,
            gate=self.linear("gate") if spec.output_gate else None,
            key_shift=self._key_shift(spec, rotary, context_length),
        )

    def _key_shift(self, spec: AttentionSpec, rotary: Rotary | None, context_length: int) -> Array | None:
        """Less the part of the keys' bias that rotation turns by a radian at most within a context: some models have it
        a hundred times as large as what tells one key from another. Only where nothing bends scores or joins them."""
        bias = self.get("k.bias")
        bent = spec.softcap or spec.head_norm or spec.clip or self.get("sinks") is not None
        if bias is None or bent or isinstance(rotary, LengthRotary):
            return None
        common = np.array(self.ops.to_host(bias), np.float32).reshape(spec.num_kv_heads, spec.head_dim)
        if rotary is not None:
            still = np.abs(self.ops.to_host(rotary.inv_freq)) * context_length < 1
            still = np.repeat(still, 2) if rotary.interleaved else np.concatenate((still, still))
            common[:, : len(still)] *= np.float32(rotary.scale) * still
        return self.ops.from_host(-common.reshape(-1)) if common.any() else None

    def _latent_attention(self, spec: AttentionSpec, rotary: Rotary) -> LatentAttention:
        latent = spec.latent
        assert latent is not None
        low = latent.q_rank is not None
        return LatentAttention(
            self.ops,
            q_down=self.linear("q_down") if low else None,
            q_norm=self.norm("q_down_norm", latent.norm) if low else None,
            q_up=self.linear("q"),
            kv_down=self.linear("kv_down"),
            kv_norm=self.norm("kv_norm", latent.norm),
            k_up=self["k_up"],
            v_up=self["v_up"],
            k_made=self["k_up"].turned() if spec.makes_keys and not self.ops.deterministic else None,
            o=self.linear("o"),
            num_heads=spec.num_heads,
            rotary=rotary,
            scores=self._scores(spec),
        )

    def _scores(self, spec: AttentionSpec) -> Scores:
        slopes = None if spec.slopes is None else self.ops.from_host(np.array(spec.slopes, np.float32))
        return Scores(
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            window=spec.window or 0,
            causal=spec.causal,
            softcap=spec.softcap,
            sinks=self.get("sinks"),
            slopes=slopes,
        )

    def _head_norm(self, spec: AttentionSpec) -> HeadNorm | None:
        norm = spec.head_norm
        if norm is None:
            return None
        width = spec.head_dim if norm.over == "heads" else None
        q, k = (self.norm(name, norm.norm, width) for name in ("q_norm", "k_norm"))
        return HeadNorm(q, k, norm.over == "all", norm.after_rope)

    def state(self, spec: StateSpec) -> Mixer:
        assert not isinstance(spec, KeptSpec), "what others compute"

        def linears(*names: str) -> dict[str, Any]:
            return {name: self.linear(name) for name in names}

        conv = Conv(self["conv"], self.get("conv.bias"), silu=not isinstance(spec, ConvSpec))
        parts = (self.ops, conv, self.linear("out"))
        if isinstance(spec, ConvSpec):
            return GatedConv(*parts, **linears("input_gate", "output_gate", "value"))
        rate = self.ops.from_host(-np.exp(self.ops.to_host(self["log_decay"])))
        decay = Decay(rate, self["step_bias"])
        if isinstance(spec, StateSpaceSpec):
            return StateSpace(
                *parts,
                **linears("gate", "mixed", "step"),
                decay=decay,
                skip=self["skip"],
                norm=self.norm("norm", spec.norm, spec.inner_size // spec.num_groups),
                num_groups=spec.num_groups,
                step_limit=spec.step_limit,
            )
        norm = self.norm("norm", spec.norm)
        return DeltaRule(*parts, **linears("q", "k", "v", "gate", "step", "rate"), decay=decay, norm=norm)

    def branch(self, name: str, spec: LayerSpec, bare: bool) -> _Branch:
        """The norms around the branch `name` of a layer; `bare`: it has none before it, or none of its own."""

        def norm(name: str) -> Norm:
            return self.norm(name, spec.norm)

        before = spec.placement in ("pre", "sandwich") and not bare
        return _Branch(
            before=norm(f"{name}_norm") if before else None,
            behind=norm(f"{name}_post_norm") if spec.placement in ("post", "sandwich") else None,
            behind_sum=norm(f"{name}_norm") if spec.placement == "residual" else None,
        )


class Decoder:
    """A loaded model on one device. Its parameters never change, so several runners may share it."""

    replayable = True

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, Parameter], ops: Ops) -> None:
        """`parameters`: as `models.parameters` names them. Raises UnsupportedModel where they do not fit."""
        check_parameters(spec, {name: tuple(value.shape) for name, value in parameters.items()})
        self.spec = spec
        self.parameters = parameters
        self.ops = ops
        self._slot_shapes = slot_shapes(spec)
        self._rotaries = _rotaries(spec, ops)
        self._groups = {index: group for group, members in enumerate(cache_groups(spec)) for index in members.layers}
        top = _Parameters(ops, parameters)
        self._embedding = Embedding(top["embedding"])
        self._embedding_norm = top.norm("embedding_norm", spec.embedding_norm) if spec.embedding_norm else None
        self._positions = Embedding(top["positions"]) if spec.positions else None
        self._token_types = Embedding(top["token_types"]) if spec.token_types else None
        self._project_in = top.linear("project_in") if spec.embedding_size else None
        self._project_out = top.linear("project_out") if spec.embedding_size and spec.head else None
        self._layers = tuple(self._layer(index, layer, parameters) for index, layer in enumerate(spec.layers))
        self._norm = top.norm("norm", spec.norm) if spec.norm else None
        table = "embedding" if spec.tied_embeddings else "head"
        self._head = Linear(top[table], top.get("head.bias")) if spec.head else None

    def _layer(self, index: int, spec: LayerSpec, parameters: Mapping[str, Parameter]) -> _Layer:
        here = _Parameters(self.ops, parameters, f"layers.{index}.")
        attention, mlp, mixes = None, None, spec.attention is not None or spec.state is not None
        if spec.attention is not None:
            rope = spec.attention.rope
            attention = here.below("attention").attention(
                spec.attention, self._rotaries[rope] if rope else None, self.spec.context_length
            )
        if spec.mlp is not None:
            mlp = here.below("moe").moe(spec.mlp) if isinstance(spec.mlp, MoESpec) else here.below("mlp").mlp(spec.mlp)
        return _Layer(
            attention=attention,
            state=here.below("state").state(spec.state) if spec.state is not None else None,
            mlp=mlp,
            attention_norms=here.branch("attention", spec, bare=not spec.attention_norm) if mixes else _NO_NORMS,
            mlp_norms=here.branch("mlp", spec, bare=spec.parallel and spec.shared_norm) if spec.mlp else _NO_NORMS,
            parallel=spec.parallel,
            residual_scale=spec.residual_scale,
            group=self._groups.get(index),
        )

    def new_cache(self, num_blocks: int, block_size: int, dtype: str, num_states: int = 0) -> KVCache:
        """A cache for this model; `dtype`: of `kernels.cells.CELLS`; `num_states`: places for states, in models that
        keep one."""
        slots = {layer: slot for group in cache_groups(self.spec) for slot, layer in enumerate(group.layers)}
        in_order = [slots.get(index) for index in range(len(self.spec.layers))]
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_states": num_states}
        return KVCache(self.ops, in_order, self._slot_shapes, dtype=dtype, states=layer_states(self.spec), **sizes)

    def new_scratch(self, num_blocks: int, block_size: int) -> KVCache:
        """Memory for the keys and values of whole sequences that one step computes, float32: as no step needs those of
        another, all layers of one shape share it."""
        shapes = list(dict.fromkeys(self._slot_shapes))
        own = {layer: slot for group in cache_groups(self.spec) for slot, layer in enumerate(group.layers)}
        slots = [
            shapes.index(self._slot_shapes[own[index]]) if index in own else None
            for index in range(len(self.spec.layers))
        ]
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_states": 1}
        return KVCache(self.ops, slots, shapes, dtype="float32", states=layer_states(self.spec), **sizes)

    def forward(self, batch: BatchContext, cache: KVCache, workspace: Workspace) -> Array:
        """Hidden states after the final norm, float32 [T,H] in the workspace; keys and values go to the cache."""
        rows, width = batch.num_tokens, self.spec.hidden_size
        hidden = workspace.take("hidden", rows, width)
        # Each branch reads its normed input and overwrites it with its output: see the layers' "out may be x".
        branch = workspace.take("branch", rows, width)
        self._embed(hidden, branch, batch, workspace)
        angles = {rotary: rotary.angles(batch, workspace) for rotary in self._rotaries.values()}
        for index, layer in enumerate(self._layers):
            second = workspace.take("second", rows, width) if layer.parallel else branch
            self._enter(layer.attention_norms, branch, hidden)
            if layer.parallel:
                self._enter(layer.mlp_norms, second, hidden if layer.mlp_norms.before else branch)
            if layer.attention is not None and layer.group is not None:
                rotary, group = layer.attention.rotary, batch.groups[layer.group]
                turned = None if rotary is None else angles[rotary]
                layer.attention(branch, branch, turned, batch, group, cache.layer(index), workspace)
                self._leave(layer.attention_norms, hidden, branch, layer.residual_scale)
            elif layer.state is not None:
                layer.state(branch, branch, batch, cache.state(index), workspace)
                self._leave(layer.attention_norms, hidden, branch, layer.residual_scale)
            if layer.mlp is None:
                continue
            if not layer.parallel:
                self._enter(layer.mlp_norms, second, hidden)
            layer.mlp(second, second, rows, workspace)
            self._leave(layer.mlp_norms, hidden, second, layer.residual_scale)
        if self._norm is not None:
            self._norm(hidden, hidden)
        return hidden

    def _enter(self, norms: _Branch, out: Array, x: Array) -> None:
        """A branch's input."""
        if norms.before is not None:
            norms.before(out, x)
        else:
            self.ops.copy(out, x)

    def _leave(self, norms: _Branch, hidden: Array, out: Array, factor: float) -> None:
        """Add what a branch gave."""
        if norms.behind is not None:
            norms.behind(out, out)
        self.ops.add(hidden, out, factor)
        if norms.behind_sum is not None:
            norms.behind_sum(hidden, hidden)

    def _embed(self, hidden: Array, spare: Array, batch: BatchContext, workspace: Workspace) -> None:
        ops, spec = self.ops, self.spec
        if self._project_in is None:
            self._embedding(hidden, batch.tokens)
        else:
            narrow = workspace.take("embedding", batch.num_tokens, spec.embedding_size or 0)
            self._embedding(narrow, batch.tokens)
            self._project_in(hidden, narrow)
        if spec.embedding_scale != 1.0:
            ops.scale(hidden, spec.embedding_scale)
        for table, ids in ((self._positions, batch.positions), (self._token_types, batch.token_types)):
            if table is not None:
                table(spare, ids)
                ops.add(hidden, spare)
        if self._embedding_norm is not None:
            self._embedding_norm(hidden, hidden)

    def logits(self, hidden: Array, rows: Array, workspace: Workspace) -> Array:
        """float32 [R,V] in the workspace, for the rows (int32 [R]) of what `forward` returned.

        `workspace` may be another than forward's: logits are wide, and few rows need them. Raises UnsupportedModel
        for a model without a head.
        """
        if self._head is None:
            raise UnsupportedModel(
                f"A {self.spec.family} model without a head gives hidden states, no logits.", "Use embed() instead."
            )
        spec, count = self.spec, int(rows.shape[0])
        taken = workspace.take("head.hidden", count, spec.hidden_size)
        logits = workspace.take("head.logits", count, spec.vocab_size)
        self.ops.take_rows(taken, hidden, rows)
        if self._project_out is not None:
            narrow = workspace.take("head.narrow", count, spec.embedding_size or 0)
            self._project_out(narrow, taken)
            taken = narrow
        self._head(logits, taken)
        if spec.logit_scale != 1.0:
            self.ops.scale(logits, spec.logit_scale)
        if spec.logit_softcap:
            self.ops.softcap(logits, spec.logit_softcap)
        return logits


def slot_shapes(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(key-value heads, key size, value size) of each pair of cache arrays; the i-th layers of all groups share the
    i-th pair.

    Raises UnsupportedModel where layers that share differ.
    """
    shapes: list[tuple[int, int, int]] = []
    for group in cache_groups(spec):
        for slot, index in enumerate(group.layers):
            layer = spec.layers[index].attention
            assert layer is not None
            shape = layer.cached
            if slot == len(shapes):
                shapes.append(shape)
            elif shapes[slot] != shape:
                raise UnsupportedModel(
                    f"Layer {index} has {shape[0]} key-value heads of {shape[1]} where a layer of another cache group "
                    f"has {shapes[slot][0]} of {shapes[slot][1]}.",
                    "This build wants equal ones in models that mix windows.",
                )
    return shapes


def layer_states(spec: ModelSpec) -> dict[int, tuple[tuple[int, int, int], ...]]:
    """The shapes of the state of each layer that has one, by its index."""
    return {index: state_shapes(layer.state) for index, layer in enumerate(spec.layers) if layer.state is not None}


def _rotaries(spec: ModelSpec, ops: Ops) -> dict[RopeSpec, Rotary]:
    """One Rotary a distinct RopeSpec, so that layers share a step's angles."""
    distinct = dict.fromkeys(attention.rope for attention in spec.attentions)
    return {rope: _rotary(rope, ops, f"rope.{number}") for number, rope in enumerate(distinct) if rope is not None}


def _rotary(spec: RopeSpec, ops: Ops, name: str) -> Rotary:
    """Raises UnsupportedModel for a stretch that the numbers beside it do not fit."""
    scaling = spec.scaling
    if scaling is not None and scaling.kind == "dynamic":

        def stretched(length: int) -> rope.Frequencies:
            theta = rope.dynamic_theta(spec.theta, spec.dim, scaling.factor, scaling.original_context_length, length)
            return rope.inverse_frequencies(theta, spec.dim)

        return LengthRotary(ops, stretched, spec.dim // 2, interleaved=spec.interleaved, name=name)
    if scaling is not None and scaling.kind == "longrope":
        every = (scaling.short_factors, scaling.long_factors)
        short, long = (rope.longrope_frequencies(spec.theta, spec.dim, factors) for factors in every)
        scale = scaling.attention_factor
        if scale is None:
            scale = rope.longrope_magnitude(scaling.factor, scaling.original_context_length)

        def chosen(length: int) -> rope.Frequencies:
            return long if length > scaling.original_context_length else short

        return LengthRotary(ops, chosen, spec.dim // 2, scale=scale, interleaved=spec.interleaved, name=name)
    inv_freq, scale = frequencies(spec)
    return Rotary(ops, inv_freq, scale=scale, interleaved=spec.interleaved, name=name)


def frequencies(spec: RopeSpec) -> tuple[rope.Frequencies, float]:
    """Inverse frequencies float32 [dim / 2], and the scale of cos and sin, where the length has no part in them."""
    scaling, scale = spec.scaling, 1.0
    inv_freq: rope.Frequencies = rope.inverse_frequencies(spec.theta, spec.dim)
    if scaling is not None and scaling.kind == "linear":
        inv_freq = inv_freq / np.float32(scaling.factor)
    elif scaling is not None and scaling.kind == "llama3":
        inv_freq = rope.llama3_frequencies(
            inv_freq,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_context_length,
        )
    elif scaling is not None:
        scale = rope.yarn_magnitude(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor
        inv_freq = rope.yarn_frequencies(
            spec.theta,
            spec.dim,
            scaling.factor,
            scaling.original_context_length,
            scaling.beta_fast,
            scaling.beta_slow,
            scaling.truncate,
        )
    if spec.factors is not None:
        inv_freq = rope.divided(inv_freq, spec.factors)
    return inv_freq, scale
