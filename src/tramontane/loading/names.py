"""NameMap: what a source calls a decoder's parameters, and what we call them.

Owns the names of Hugging Face checkpoints, of GGUF files and of Mistral's own layout. Must not know: shapes, values,
families.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tramontane.errors import UnsupportedModel


@dataclass(frozen=True)
class NameMap:
    """Names of one kind of source. A module's tensors are its name and `.weight` or `.bias`."""

    fixed: Mapping[str, str]
    """Module -> canonical name."""
    layer_prefix: str
    layer: Mapping[str, str]
    """The same below `layer_prefix`, a number and a dot."""
    ignored: re.Pattern[str]
    """Tensors that are no parameters: buffers that follow from the configuration, or that the spec took already."""

    def canonical(self, names: Iterable[str], source: str) -> dict[str, str]:
        """Canonical parameter name -> the source's tensor name.

        Raises UnsupportedModel for tensors that this map does not know.
        """
        found: dict[str, str] = {}
        unknown = []
        for name in names:
            if self.ignored.fullmatch(name):
                continue
            canonical = self._of(name)
            if canonical is None:
                unknown.append(name)
            else:
                found[canonical] = name
        if unknown:
            more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            raise UnsupportedModel(
                f"{source} has tensors that this build does not know: {', '.join(unknown[:4])}{more}.",
                "Use another model, or this model in its plain form (adapters merged, no extra heads).",
            )
        return found

    def _of(self, name: str) -> str | None:
        module, _, kind = name.rpartition(".")
        ending = {"weight": "", "bias": ".bias"}.get(kind)
        if ending is None:
            return None
        if module in self.fixed:
            return self.fixed[module] + ending
        # A number has one spelling, so that two tensors never claim one parameter.
        numbered = re.fullmatch(re.escape(self.layer_prefix) + r"(0|[1-9][0-9]{0,5})\.(.+)", module)
        if numbered is None or numbered[2] not in self.layer:
            return None
        return f"layers.{numbered[1]}.{self.layer[numbered[2]]}{ending}"


HF_NAMES = NameMap(
    fixed={"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"},
    layer_prefix="model.layers.",
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
    ignored=re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
)

GGUF_NAMES = NameMap(
    fixed={"token_embd": "embedding", "output_norm": "norm", "output": "head"},
    layer_prefix="blk.",
    layer={
        "attn_norm": "attention_norm",
        "attn_q": "attention.q",
        "attn_k": "attention.k",
        "attn_v": "attention.v",
        "attn_output": "attention.o",
        "ffn_norm": "mlp_norm",
        "ffn_gate": "mlp.gate",
        "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
    },
    ignored=re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"),
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
    },
    ignored=re.compile(r"rope\.freqs"),
)
