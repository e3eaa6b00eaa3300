"""The fallback: a transformers model on our paged cache and our weights, for what no ModelSpec describes.

Owns the choice of how such a model runs, and the check that it computes what transformers computes. Needs the extra
transformers. Must not know: files, requests.

Mostly the batch goes through the model as one row of tokens with their positions. Tokens of one sequence meet each
other in the attention function alone, which transformers lets us register; nothing else needs to know of sequences.
A model whose attention ours cannot stand for sees its sequences one after the other, each with a cache that reads and
writes our blocks. torch's number of threads, which is the process's, becomes that of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tramontane.errors import InvalidRequest, MissingExtra, UnsupportedModel
from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext, GroupContext
from tramontane.layers.kvcache import KVCache
from tramontane.models.decoder import layer_states, slot_shapes
from tramontane.models.spec import AttentionSpec, KeptSpec, LayerSpec, MLPSpec, ModelSpec, cache_groups
from tramontane.weights import Weight

try:
    import torch

    from tramontane.models.fallback.build import build, settle
    from tramontane.models.fallback.module import Module, attending, ordinary_tokens, stated_context
    from tramontane.models.fallback.passes import ATTENTION, Refused, running
    from tramontane.models.fallback.row import Row
    from tramontane.models.fallback.sequences import Sequences
    from tramontane.models.fallback.tensors import WeightTensor, to_array, to_tensor
except ImportError as error:
    raise MissingExtra("transformers", "Running a model through transformers' own layers") from error

_TOLERANCE = 1e-3
"""Of the check, as a part of the largest logit: what float32 makes of sums in another order is far below."""
_BLOCK = 4
_Part = tuple[list[int], int, int, tuple[int, ...]]
"""Of a sequence: tokens, where they start, its place for states, its blocks."""


class FallbackModel:
    """A model of transformers that a runner can run. Not for several threads at once."""

    replayable = False

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Array],
        weights: Mapping[str, Sequence[Weight]],
        ops: Ops,
        source: str,
    ) -> None:
        """`config`: a config.json; `tensors`, on the host, and `weights`, each a matrix or those of a stack: by the
        checkpoint's names.

        Raises UnsupportedModel where no way gives what transformers computes, or CorruptCheckpoint.
        """
        if ops.deterministic:
            raise UnsupportedModel(
                f"{source} runs through transformers' own layers, whose arithmetic is not deterministic.",
                "Use deterministic=False.",
            )
        if ops.processors:
            raise InvalidRequest("pin_threads", f"{source} needs torch's threads, which are not", "Leave it out.")
        if ops.device == "cpu":
            torch.set_num_threads(ops.threads)
        self.ops = ops
        model = build(config, tensors, weights, ops, source)
        try:
            self.module = Module(model)
            tokens = ordinary_tokens(model.config).to(model.device)
            with torch.inference_mode(), attending(model, "eager"):
                self.module.find_offset(tokens)
                wanted = self.module.whole(tokens)
        except Exception as error:
            raise _refusal(source, [_reason(error)]) from error
        reasons: dict[str, str] = {}
        for name, attention, way in self._ways(tokens):
            model.set_attn_implementation(attention)
            try:
                self.way = way()
                self.spec = self._spec(wanted)
                settle(model)
                self._check(tokens, wanted)
            except Exception as error:
                reasons.setdefault(_reason(error), name)
            else:
                return
        raise _refusal(source, [f"{name}: {reason}" for reason, name in reasons.items()])

    def _ways(self, tokens: Any) -> list[tuple[str, str, Callable[[], Row | Sequences]]]:
        """From the best: (name, transformers' name of the attention, the way)."""
        return [
            (Row.name, ATTENTION, lambda: Row(self.module, self.ops, tokens, self._context_length())),
            ("sequence by sequence", "eager", lambda: Sequences(self.module, tokens)),
            ("token by token", "eager", lambda: Sequences(self.module, tokens, singly=True)),
        ]

    @property
    def matrices(self) -> dict[str, WeightTensor]:
        """The weights that the model computes with, by transformers' names of its parameters."""
        named = self.module.model.named_parameters()
        return {name: value for name, value in named if isinstance(value, WeightTensor)}

    def _context_length(self) -> int:
        return stated_context(self.module.model.config) - self.module.offset

    def _spec(self, logits: Any) -> ModelSpec:
        """What the engine wants to know of the model; `logits` [T,V]."""
        config = self.module.model.config.get_text_config(decoder=True)
        hidden = int(config.hidden_size)
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        mlp = MLPSpec(max(inner) if isinstance(inner, (list, tuple)) else int(inner))
        attentions = [
            AttentionSpec(layer.num_heads, layer.num_kv_heads, layer.head_dim, None, layer.value_dim, layer.window)
            for layer in self.way.layers
        ]
        size = self.way.state_size
        kept = (LayerSpec(None, None, state=KeptSpec(size)),) if size else ()
        spec = ModelSpec(
            family=config.model_type,
            hidden_size=hidden,
            vocab_size=logits.shape[1],
            context_length=self._context_length(),
            layers=(*(LayerSpec(attention, mlp) for attention in attentions), *kept),
        )
        try:
            slot_shapes(spec)
        except UnsupportedModel:  # layers of other shapes must not share: they keep all there is
            attentions = [replace(attention, window=None) for attention in attentions]
            return replace(spec, layers=(*(LayerSpec(attention, mlp) for attention in attentions), *kept))
        return spec

    def new_cache(self, num_blocks: int, block_size: int, dtype: str, num_states: int = 0) -> KVCache:
        """As `Decoder.new_cache`."""
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_states": num_states}
        return KVCache(
            self.ops, self._slots(), slot_shapes(self.spec), dtype=dtype, states=layer_states(self.spec), **sizes
        )

    def new_scratch(self, num_blocks: int, block_size: int) -> KVCache:
        """As `Decoder.new_scratch`; but layers share nothing where tokens go through them one after the other."""
        shapes = slot_shapes(self.spec)
        distinct, slots = list(dict.fromkeys(shapes)), self._slots()
        if self.way.name != "token by token":
            slots = [None if slot is None else distinct.index(shapes[slot]) for slot in slots]
            shapes = distinct
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_states": 1}
        return KVCache(self.ops, slots, shapes, dtype="float32", states=layer_states(self.spec), **sizes)

    def _slots(self) -> list[int | None]:
        """The pair of arrays of each layer, None for the one that keeps states."""
        slots = {layer: slot for group in cache_groups(self.spec) for slot, layer in enumerate(group.layers)}
        return [slots.get(index) for index in range(len(self.spec.layers))]

    def forward(self, batch: BatchContext, cache: KVCache, workspace: Workspace) -> Array:
        """Hidden states after the last layer, float32 [T,H]; keys and values go to the cache. The arrays are torch's
        own: `workspace` is not used."""
        return to_array(self.ops, self._hidden(batch, cache))

    def logits(self, hidden: Array, rows: Array, workspace: Workspace) -> Array:
        """float32 [R,V] for the rows (int32 [R]) of what `forward` returned."""
        return to_array(self.ops, self._head(to_tensor(hidden)[to_tensor(rows).long()]))

    def _hidden(self, batch: BatchContext, cache: KVCache) -> Any:
        groups = {index: group for group, members in enumerate(cache_groups(self.spec)) for index in members.layers}
        return self.way.hidden(batch, cache, [groups[index] for index in sorted(groups)])

    def _head(self, hidden: Any) -> Any:
        with running(_Head()):
            return self.module.logits(hidden)

    def _check(self, tokens: Any, wanted: Any) -> None:
        """Hold a text in chunks, beside another in one batch, to its logits `wanted`, of which the other is the
        beginning. Raises Refused."""
        groups = len(cache_groups(self.spec))
        cache = self.new_cache(6 * groups, _BLOCK, "float32", 2)
        ids = tokens.tolist()
        long, short = (0, (0, 1, 2)), (1, (3, 4))
        steps: tuple[list[_Part], ...] = (
            [(ids[:6], 0, *long)],
            [(ids[:4], 0, *short), (ids[6:9], 6, *long)],
            [(ids[9:], 9, *long), (ids[4:7], 4, *short)],
        )
        for work in steps:
            ours = self._head(self._hidden(self._batch(work, groups), cache))
            theirs = torch.cat([wanted[start : start + len(part)] for part, start, *_ in work])
            difference = float((ours - theirs).abs().max())
            if not difference <= _TOLERANCE * float(wanted.abs().max()):
                raise Refused(f"its logits differ from transformers' own by {difference:.2g}")

    def _batch(self, work: list[_Part], groups: int) -> BatchContext:
        """A batch over a small cache of 6 blocks a group."""

        def ints(values: Any) -> Array:
            return self.ops.from_host(np.array(values, np.int32))

        places = [(blocks, at) for part, start, _, blocks in work for at in range(start, start + len(part))]
        slots = np.array([blocks[at // _BLOCK] * _BLOCK + at % _BLOCK for blocks, at in places])
        tables = np.array([[*blocks, *[5] * (3 - len(blocks))] for *_, blocks in work])
        return BatchContext(
            num_tokens=len(places),
            num_seqs=len(work),
            tokens=ints([id_ for part, *_ in work for id_ in part]),
            positions=ints([at for _, at in places]),
            query_start=ints(np.cumsum([0, *(len(part) for part, *_ in work)])),
            context_lens=ints([start + len(part) for part, start, *_ in work]),
            states=ints([place for _, _, place, _ in work]),
            groups=tuple(GroupContext(ints(slots + 6 * _BLOCK * g), ints(tables + 6 * g)) for g in range(groups)),
        )


class _Head:
    """The pass of a head: masks may be made there, and are not used."""

    def mask(self, allowed: Any) -> None:
        return None

    def attend(self, q: Any, k: Any, v: Any, mask: Any, options: Any) -> Any:
        raise Refused("its head attends")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {str(error).rstrip('.')[:200]}"


def _refusal(source: str, reasons: list[str]) -> UnsupportedModel:
    return UnsupportedModel(
        f"Through transformers' own layers {source} does not run on this engine either ({'; '.join(reasons)}).",
        "Use transformers itself: backend='transformers'.",
    )
