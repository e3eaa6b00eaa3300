"""NameMap: what a source calls a decoder's parameters, and what we call them, as data.

Owns the names that families share: those of Hugging Face checkpoints of the llama lineage, of GGUF files and of
Mistral's own layout. Must not know: shapes, values, files.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import field, replace
from typing import Literal

from tramontane.records import dataclass


@dataclass(frozen=True)
class Fused:
    """A tensor whose rows are several parameters'."""

    parts: tuple[str, ...]
    layout: Literal["stacked", "grouped", "alternating"] = "stacked"
    """One after the other; the same within each group of key-value heads; row by row in turn."""
    groups: int = 0
    """Of "grouped", where they are not those of key-value heads."""
    turned: frozenset[str] = frozenset()
    """Parts that are stored [inputs, outputs] in each group."""


QKV = ("attention.q", "attention.k", "attention.v")
GATE_UP = ("mlp.gate", "mlp.up")
LATENT_UP = Fused(("attention.k_up", "attention.v_up"), "grouped", turned=frozenset({"attention.k_up"}))
"""What leads from latent vectors to keys and values: of keys we want the way back."""


@dataclass(frozen=True)
class NameMap:
    """Names of one kind of source, without `.weight`; a `.bias` is that of the same parameter.

    A name that ends otherwise stands in full, and so does what it maps to. `*` stands for a number: that of an expert
    or of a head, whose tensors make up one parameter. What is not here is not understood, and refused.
    """

    fixed: Mapping[str, str]
    """Name -> canonical name."""
    layer_prefix: str
    layer: Mapping[str, str | Fused]
    """The same below `layer_prefix`, a number and a dot."""
    ignored: str = r"(?!)"
    """A pattern of tensors that are no parameters: buffers that follow from the configuration, or that the spec has."""
    optional_prefixes: tuple[str, ...] = ()
    """What may stand before every name, or not: files of a model without its head lack it."""
    transposed: frozenset[str] = frozenset()
    """Names of matrices (as in `layer`) that are stored [..., inputs, outputs]."""
    shifted: str = r"(?!)"
    """A pattern of canonical vectors that are stored less one."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Canonical matrix -> rows at its beginning that the model does not use."""
    unit_rows: frozenset[str] = frozenset()
    """Canonical matrices whose rows are divided by their lengths before they are used."""
    variant: tuple[str, Mapping[str, str]] | None = None
    """A tensor, and what else is meant below a layer where there is that one."""
    spare_layers: int = 0
    """How many layers may follow the model's: those that guess at further tokens, which are not used."""

    def with_layer(self, layer: Mapping[str, str | Fused | None], **changes: object) -> NameMap:
        """A copy with other names below a layer (None: without the name), and other fields."""
        merged = {name: target for name, target in {**self.layer, **layer}.items() if target is not None}
        return replace(self, layer=merged, **changes)  # type: ignore[arg-type]

    def layer_of(self, name: str) -> int:
        """The number of the layer that a tensor is in; -1 for one that is in none."""
        for prefix in self.optional_prefixes:
            name = name.removeprefix(prefix)
        numbered = re.match(re.escape(self.layer_prefix) + r"(\d{1,6})\.", name)
        return int(numbered[1]) if numbered is not None else -1

    def of(self, tensors: Container[str]) -> NameMap:
        """The names in a file that has these tensors."""
        if self.variant is None or self.variant[0] not in tensors:
            return self
        return self.with_layer(self.variant[1])

    def target(self, name: str) -> Target | None:
        """Where a tensor belongs; None for one that is not understood."""
        for prefix in self.optional_prefixes:
            name = name.removeprefix(prefix)
        inner, layer = name, ""
        names: Mapping[str, str | Fused] = self.fixed
        # A number has one spelling, so that two tensors never claim one parameter.
        numbered = re.fullmatch(re.escape(self.layer_prefix) + r"(0|[1-9][0-9]{0,5})\.(.+)", name)
        if numbered is not None:
            inner, layer, names = numbered[2], f"layers.{numbered[1]}.", self.layer
        number: int | None = None
        place = re.search(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)", inner)
        if place is not None:
            inner, number = f"{inner[: place.start()]}*{inner[place.end() :]}", int(place[0])
        ending, key = "", inner
        if inner not in names:
            key, _, kind = inner.rpartition(".")
            ending = {"weight": "", "bias": ".bias"}.get(kind, "?")
        if key not in names or ending == "?":
            return None
        found = names[key]
        fused = found if isinstance(found, Fused) else Fused((found,))
        parts = tuple(f"{layer}{part}{ending}" for part in fused.parts)
        return Target(
            parts,
            fused.layout,
            number,
            transposed=key in self.transposed and not ending,
            groups=fused.groups,
            turned=tuple(part in fused.turned for part in fused.parts),
        )


@dataclass(frozen=True)
class Target:
    """The parameters that a tensor holds, by their canonical names."""

    parts: tuple[str, ...]
    layout: str
    number: int | None
    """Which piece of them it is, where pieces are tensors of their own."""
    transposed: bool
    groups: int = 0
    """As of `Fused`."""
    turned: tuple[bool, ...] = (False,)
    """Of each part, as of `Fused`."""


HF_NAMES = NameMap(
    fixed={"embed_tokens": "embedding", "norm": "norm", "lm_head": "head"},
    layer_prefix="layers.",
    layer={
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.o_proj": "attention.o",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    },
    ignored=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    optional_prefixes=("model.",),
)

GGUF_NAMES = NameMap(
    fixed={
        "token_embd": "embedding",
        "token_embd_norm": "embedding_norm",
        "position_embd": "positions",
        "token_types": "token_types",
        "output_norm": "norm",
        "output": "head",
    },
    layer_prefix="blk.",
    layer={
        "attn_norm": "attention_norm",
        "attn_q": "attention.q",
        "attn_k": "attention.k",
        "attn_v": "attention.v",
        "attn_qkv": Fused(QKV),
        "attn_output": "attention.o",
        "attn_q_norm": "attention.q_norm",
        "attn_k_norm": "attention.k_norm",
        "attn_sinks": "attention.sinks",
        "attn_q_a": "attention.q_down",
        "attn_q_a_norm": "attention.q_down_norm",
        "attn_q_b": "attention.q",
        "attn_kv_a_mqa": "attention.kv_down",
        "attn_kv_a_norm": "attention.kv_norm",
        "attn_kv_b": LATENT_UP,
        "attn_k_b": "attention.k_up",
        "attn_v_b": "attention.v_up",
        "post_attention_norm": "attention_post_norm",
        "ffn_norm": "mlp_norm",
        "post_ffw_norm": "mlp_post_norm",
        "ffn_gate": "mlp.gate",
        "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
        "ffn_gate_inp": "moe.router",
        "exp_probs_b": "moe.router.correction",
        "exp_probs_b.bias": "moe.router.correction",
        "ffn_gate_exps": "moe.experts.gate",
        "ffn_up_exps": "moe.experts.up",
        "ffn_down_exps": "moe.experts.down",
        "ffn_gate_shexp": "moe.shared.gate",
        "ffn_up_shexp": "moe.shared.up",
        "ffn_down_shexp": "moe.shared.down",
        "ffn_gate_inp_shexp": "moe.shared_gate",
    },
    ignored=r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?",
)

MISTRAL_NAMES = NameMap(
    fixed={"tok_embeddings": "embedding", "norm": "norm", "output": "head"},
    layer_prefix="layers.",
    layer={
        "attention_norm": "attention_norm",
        "attention.wq": "attention.q",
        "attention.wk": "attention.k",
        "attention.wv": "attention.v",
        "attention.wo": "attention.o",
        "ffn_norm": "mlp_norm",
        "feed_forward.w1": "mlp.gate",
        "feed_forward.w3": "mlp.up",
        "feed_forward.w2": "mlp.down",
        "feed_forward.gate": "moe.router",
        "feed_forward.experts.*.w1": "moe.experts.gate",
        "feed_forward.experts.*.w3": "moe.experts.up",
        "feed_forward.experts.*.w2": "moe.experts.down",
    },
    ignored=r"rope\.freqs",
)
