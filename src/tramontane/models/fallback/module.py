"""A causal language model of transformers as two calls: tokens to hidden states, hidden states to logits.

Owns how positions get into a model, and where its head begins. Must not know: attention, weights.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tramontane.models.fallback.passes import Refused

_POSITIONS: ContextVar[Any] = ContextVar("positions of the pass", default=None)
_HIDDEN: ContextVar[Any] = ContextVar("hidden states that are given", default=None)
_UNBOUNDED = 32768
"""The context of models that know no longest one."""
_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies follow from the longest position of a pass."""
_LENGTHS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_ctx")


class Module:
    """Runs one row of tokens at positions of ours, and the head by itself."""

    def __init__(self, model: Any) -> None:
        """`model`: a PreTrainedModel with a head. Raises Refused where its head cannot be told from its layers."""
        self.model = model
        self._base = _base(model)
        accepted = inspect.signature(self._base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_kept = "logits_to_keep" in accepted
        self._cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        if not self._takes_positions:
            _hook_positions(self._base)
        self.offset = 0
        """Added to positions: some models begin to count behind their padding."""
        self._kind: Any = None
        # The model must not hold itself: its memory is to go with the last who uses it.
        ours, base, layers = weakref.proxy(self), weakref.ref(self._base), type(self._base).forward

        def layers_or_given(*args: Any, **options: Any) -> Any:
            given = _HIDDEN.get()
            return layers(base(), *args, **options) if given is None else ours._kind(last_hidden_state=given.pop())

        self._base.forward = layers_or_given

    @property
    def parts(self) -> Iterator[Any]:
        """The modules below the head."""
        yield from self._base.modules()

    def hidden(self, tokens: Any, positions: Any, past: Any = None) -> Any:
        """float32 [T,H] after the last layer, for tokens and positions int64 [T], with transformers' cache `past`."""
        positions = positions + self.offset
        token = _POSITIONS.set(positions if past is None else None)  # a cache tells how many tokens there were
        inputs: dict[str, Any] = {"input_ids": tokens[None], "use_cache": past is not None}
        if past is not None:
            inputs[self._cache_name] = past
        if self._takes_positions:
            inputs["position_ids"] = positions[None]
        if self._takes_kept:  # a number would let some models drop tokens on the way
            inputs["logits_to_keep"] = slice(None)
        try:
            output = self._base(**inputs)
        finally:
            _POSITIONS.reset(token)
        if getattr(output, "last_hidden_state", None) is None:
            raise Refused("its layers return no hidden states")
        self._kind = type(output)
        return output.last_hidden_state[0].to(torch.float32)

    def logits(self, hidden: Any) -> Any:
        """float32 [R,V] of hidden states [R,H]: whatever the model does behind its layers."""
        given = [hidden[None]]
        token = _HIDDEN.set(given)
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            _HIDDEN.reset(token)
        if given:
            raise Refused("its head cannot be told from its layers")
        return logits[0].to(torch.float32)

    def whole(self, tokens: Any) -> Any:
        """float32 [T,V]: the logits of a text, computed as transformers does."""
        return self.model(input_ids=tokens[None], use_cache=False).logits[0].to(torch.float32)

    def find_offset(self, tokens: Any) -> None:
        """See where the model begins to count positions when it is not told."""
        tables = [part for name, part in self._base.named_modules() if "position" in name and _is_table(part)]
        if not tables or not self._takes_positions:
            return
        seen: list[int] = []
        hook = tables[0].register_forward_pre_hook(lambda _, args: seen.append(int(args[0].reshape(-1)[0])))
        try:
            self._base(input_ids=tokens[None], use_cache=False)
            self.hidden(tokens, torch.arange(len(tokens), device=tokens.device))
        finally:
            hook.remove()
        if len(seen) == 2:
            self.offset = seen[0] - seen[1]


def _is_table(part: Any) -> bool:
    return isinstance(part, nn.Embedding)


def _base(model: Any) -> Any:
    """The part of a model that is without its head."""
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    for candidate in (model.get_decoder(), model.base_model, *inner):
        if candidate is not model and "input_ids" in inspect.signature(candidate.forward).parameters:
            return candidate
    raise Refused("its head cannot be told from its layers")


def _hook_positions(base: Any) -> None:
    """Give our positions to embeddings of positions that would count themselves."""

    def hook(_: Any, args: Any, options: Any) -> Any:
        positions, theirs = _POSITIONS.get(), options.get("position_ids")
        if positions is None:
            return args, options
        row = theirs is not None and theirs.dim() == 2
        return args, {**options, "position_ids": positions[None] if row else positions}

    for part in base.modules():
        takes = "position_ids" in inspect.signature(part.forward).parameters
        if part is not base and takes and "Embedding" in type(part).__name__:
            part.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Inside, the model attends by the implementation `name`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def stated_context(config: Any) -> int:
    """The longest sequence that a model of this configuration takes, by its own word."""
    config = config.get_text_config(decoder=True)
    stated = [getattr(config, name, None) for name in _LENGTHS]
    return next((int(length) for length in stated if length), _UNBOUNDED)


def rotary_by_length(parts: Iterable[Any]) -> str | None:
    """The kind of a rotary embedding among the parts that follows from the longest position of a pass, if any does."""
    for part in parts:
        kinds = getattr(part, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in _BY_LENGTH:
                return str(kind)
    return None


def ordinary_tokens(config: Any) -> Any:
    """Ten ordinary tokens, none of which the configuration gives a meaning."""
    text = config.get_text_config(decoder=True)
    special = {
        value
        for part in (config, text)
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ids = [id_ for id_ in range(min(int(text.vocab_size), 4096)) if id_ not in special]
    step = max(1, len(ids) // 10)
    return torch.tensor((ids[step // 2 :: step] * 10)[:10])
