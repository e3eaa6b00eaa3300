"""The one decoder: what a ModelSpec describes, computed.

Owns the names and shapes of a decoder's parameters, and the order of its layers. Must not know: families, files,
requests, how weights are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tramontane.errors import UnsupportedModel
from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers import rope
from tramontane.layers.attention import Attention
from tramontane.layers.context import BatchContext
from tramontane.layers.embedding import Embedding
from tramontane.layers.kvcache import KVCache
from tramontane.layers.linear import Linear
from tramontane.layers.mlp import MLP
from tramontane.layers.norm import RMSNorm
from tramontane.layers.rope import Rotary
from tramontane.models.spec import LayerSpec, ModelSpec, RopeSpec, cache_groups
from tramontane.weights import Weight

Parameter = Weight | Array


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by its canonical name: matrices [N,K] are Weights, vectors float32 arrays."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embedding": (spec.vocab_size, hidden), "norm": (hidden,)}
    if not spec.tied_embeddings:
        shapes["head"] = (spec.vocab_size, hidden)
    for index, layer in enumerate(spec.layers):
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        inner = layer.intermediate_size
        matrices = {
            "attention.q": ((q, hidden), layer.qkv_bias),
            "attention.k": ((kv, hidden), layer.qkv_bias),
            "attention.v": ((kv, hidden), layer.qkv_bias),
            "attention.o": ((hidden, q), layer.output_bias),
            "mlp.gate": ((inner, hidden), layer.mlp_bias),
            "mlp.up": ((inner, hidden), layer.mlp_bias),
            "mlp.down": ((hidden, inner), layer.mlp_bias),
        }
        shapes |= {f"layers.{index}.{norm}": (hidden,) for norm in ("attention_norm", "mlp_norm")}
        shapes |= {f"layers.{index}.{name}": shape for name, (shape, _) in matrices.items()}
        shapes |= {f"layers.{index}.{name}.bias": shape[:1] for name, (shape, bias) in matrices.items() if bias}
    return shapes


def check_parameters(spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the parameters that there are against those the spec wants. Raises UnsupportedModel naming the first few
    that are missing, not wanted, or of another shape."""
    wanted = parameter_shapes(spec)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UnsupportedModel(
            f"The parameters are not those of the {spec.family} model that the checkpoint describes: "
            f"{', '.join(problems[:4])}{more}.",
            "Check that the configuration belongs to these weights; architecture= names another family.",
        )


@dataclass(frozen=True)
class _Layer:
    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP
    group: int
    """Which cache group it is in."""


class Decoder:
    """A loaded model on one device. Its parameters never change, so several runners may share it."""

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, Parameter], ops: Ops) -> None:
        """`parameters`: as `parameter_shapes` names them. Raises UnsupportedModel where they do not fit."""
        check_parameters(spec, {name: tuple(value.shape) for name, value in parameters.items()})
        self.spec = spec
        self.parameters = parameters
        self.ops = ops
        self._slot_shapes = slot_shapes(spec)
        self._rotaries = _rotaries(spec, ops)
        self._groups = {index: group for group, members in enumerate(cache_groups(spec)) for index in members.layers}
        self._embedding = Embedding(parameters["embedding"])
        self._layers = tuple(self._layer(index, layer, parameters) for index, layer in enumerate(spec.layers))
        self._norm = RMSNorm(ops, parameters["norm"], spec.norm_eps)
        self._head = Linear(parameters["embedding" if spec.tied_embeddings else "head"])

    def _layer(self, index: int, spec: LayerSpec, parameters: Mapping[str, Parameter]) -> _Layer:
        def at(name: str) -> Parameter:
            return parameters[f"layers.{index}.{name}"]

        def linear(name: str) -> Linear:
            return Linear(at(name), parameters.get(f"layers.{index}.{name}.bias"))

        attention = Attention(
            self.ops,
            q=linear("attention.q"),
            k=linear("attention.k"),
            v=linear("attention.v"),
            o=linear("attention.o"),
            rotary=self._rotaries[spec.rope],
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.window,
        )
        return _Layer(
            attention_norm=RMSNorm(self.ops, at("attention_norm"), spec.norm_eps),
            attention=attention,
            mlp_norm=RMSNorm(self.ops, at("mlp_norm"), spec.norm_eps),
            mlp=MLP(self.ops, linear("mlp.gate"), linear("mlp.up"), linear("mlp.down"), spec.activation),
            group=self._groups[index],
        )

    def new_cache(self, num_blocks: int, block_size: int, dtype: str) -> KVCache:
        """A cache for this model; `dtype` float32, float16 or bfloat16."""
        slots = {layer: slot for group in cache_groups(self.spec) for slot, layer in enumerate(group.layers)}
        in_order = [slots[index] for index in range(len(self.spec.layers))]
        return KVCache(self.ops, in_order, self._slot_shapes, num_blocks=num_blocks, block_size=block_size, dtype=dtype)

    def forward(self, batch: BatchContext, cache: KVCache, workspace: Workspace) -> Array:
        """Hidden states after the final norm, float32 [T,H] in the workspace; keys and values go to the cache."""
        ops, rows, width = self.ops, batch.num_tokens, self.spec.hidden_size
        hidden = workspace.take("hidden", rows, width)
        # Each branch reads its normed input and overwrites it with its output: see the layers' "out may be x".
        branch = workspace.take("branch", rows, width)
        self._embedding(hidden, batch.tokens)
        angles = {rotary: rotary.angles(batch, workspace) for rotary in self._rotaries.values()}
        for index, layer in enumerate(self._layers):
            group, arrays = batch.groups[layer.group], cache.layer(index)
            layer.attention_norm(branch, hidden)
            layer.attention(branch, branch, angles[layer.attention.rotary], batch, group, arrays, workspace)
            ops.add(hidden, branch)
            layer.mlp_norm(branch, hidden)
            layer.mlp(branch, branch, rows, workspace)
            ops.add(hidden, branch)
        self._norm(hidden, hidden)
        return hidden

    def logits(self, hidden: Array, rows: Array, workspace: Workspace) -> Array:
        """float32 [R,V] in the workspace, for the rows (int32 [R]) of what `forward` returned.

        `workspace` may be another than forward's: logits are wide, and few rows need them.
        """
        count = int(rows.shape[0])
        taken = workspace.take("head.hidden", count, self.spec.hidden_size)
        logits = workspace.take("head.logits", count, self.spec.vocab_size)
        self.ops.take_rows(taken, hidden, rows)
        self._head(logits, taken)
        return logits


def slot_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(key-value heads, head size) of each pair of cache arrays; the i-th layers of all groups share the i-th pair.

    Raises UnsupportedModel where layers that share differ.
    """
    shapes: list[tuple[int, int]] = []
    for group in cache_groups(spec):
        for slot, index in enumerate(group.layers):
            layer = spec.layers[index]
            shape = (layer.num_kv_heads, layer.head_dim)
            if slot == len(shapes):
                shapes.append(shape)
            elif shapes[slot] != shape:
                raise UnsupportedModel(
                    f"Layer {index} has {shape[0]} key-value heads of {shape[1]} where a layer of another cache group "
                    f"has {shapes[slot][0]} of {shapes[slot][1]}.",
                    "This build wants equal ones in models that mix windows.",
                )
    return shapes


def _rotaries(spec: ModelSpec, ops: Ops) -> dict[RopeSpec, Rotary]:
    """One Rotary a distinct RopeSpec, so that layers share a step's angles."""
    distinct = dict.fromkeys(layer.rope for layer in spec.layers)
    rotaries = {}
    for number, rope_spec in enumerate(distinct):
        inv_freq, scale = frequencies(rope_spec)
        name = f"rope.{number}"
        rotaries[rope_spec] = Rotary(ops, inv_freq, scale=scale, interleaved=rope_spec.interleaved, name=name)
    return rotaries


def frequencies(spec: RopeSpec) -> tuple[rope.Frequencies, float]:
    """Inverse frequencies float32 [dim / 2], and the scale of cos and sin."""
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
        inv_freq = np.divide(inv_freq, np.array(spec.factors, np.float32), dtype=np.float32)
    return inv_freq, scale
